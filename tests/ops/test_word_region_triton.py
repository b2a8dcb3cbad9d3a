"""The Triton backend of word-region attention where there is no GPU: in Triton's interpreter, and what needs no kernel."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from jrl_kernels.ops.word_region import triton_launch
from jrl_kernels.ops.word_region.cases import BENCHMARK_SHAPES, Shape
from jrl_kernels.ops.word_region.sweep import Problem
from tests.interpreter import groups, run
from tests.serving import Server


@pytest.mark.slow
@pytest.mark.parametrize("group", groups("word_region"))
def test_in_the_interpreter(group: str, interpreter: Server) -> None:
    run(group, interpreter)


def problem_of(shape: Shape, dtype: torch.dtype, prenormalize: str = "none") -> Problem:
    def meta(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    values = shape.value_width > 0
    return Problem(
        meta(shape.images, shape.regions, shape.width),
        meta(shape.captions, shape.words, shape.width),
        meta(shape.images, shape.regions, shape.value_width) if values else None,
        meta(shape.captions, shape.words, shape.value_width) if values else None,
        None,
        None,
        torch.empty((), device="meta"),
        prenormalize,
        hard=False,
        cosine=True,
    )


SHAPES = [
    *BENCHMARK_SHAPES["cuda"],
    Shape(4096, 4096, 64, 256, 512),
    Shape(3, 100000, 77, 1024, 64),
    Shape(100000, 1, 1, 4, 64),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_of_the_backward_stay_within_their_budget(shape: Shape, dtype: torch.dtype) -> None:
    images, captions = triton_launch.block(problem_of(shape, dtype))
    assert 1 <= images <= shape.images
    assert 1 <= captions <= shape.captions
    scores = images * captions * shape.words * shape.regions
    matrices = 3 + (shape.value_width > 0)
    assert matrices * scores * dtype.itemsize <= triton_launch.TILE_BYTES
    everything = shape.images * shape.captions * shape.words * shape.regions
    tiles = -(-shape.images // images) * -(-shape.captions // captions)
    width = shape.value_width or shape.width
    assert (
        tiles
        <= 1
        + 3 * (matrices + 2 + width / shape.regions) * everything * dtype.itemsize / triton_launch.TILE_BYTES
    )


@pytest.mark.parametrize("work", ["fused forward", "fused gradient", "statistics", "attention", "gradient"])
@pytest.mark.parametrize("words", [1, 5, 32, 77, 300, 4096])
@pytest.mark.parametrize("regions", [1, 36, 64, 289, 4096])
def test_a_program_has_whole_captions_and_room_for_them(
    regions: int, words: int, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    problem = problem_of(Shape(2, 3, words, regions, 64), torch.bfloat16, "softmax")
    if triton_launch.fused(problem) != work.startswith("fused"):
        return
    launch = triton_launch.Launch(problem, work)
    assert launch.together >= words
    assert launch.queries % launch.together == 0
    assert launch.queries * launch.keys <= 1 << 16
    assert launch.keys >= min(regions, 16)
    assert launch.row_tiles(3) * (launch.queries // launch.together) >= 3
    assert launch.key_tiles * launch.keys >= regions
