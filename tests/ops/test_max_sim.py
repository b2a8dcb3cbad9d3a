"""Values and gradients of late interaction: float64 truth, every gradient, golden values, properties."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jrl_kernels import max_sim, max_sim_varlen
from jrl_kernels.ops.max_sim.cases import SHAPES, Shape, make_inputs, pack
from tests.ops.conformance import (
    BACKENDS,
    FUSED,
    FUSED_DTYPES,
    assert_close_to_truth,
    cast,
    det,
    value_and_gradients,
)

DIRECTIONS = ("words", "regions", "both")
REDUCTIONS = ("sum", "mean")
MASK_MODES = ("exclude", "zero")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
PRECISE = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}".replace("torch.", ""), marks=case.marks)
    for case in BACKENDS
    for dtype in TOLERANCE
    if not (case.id == "triton" and dtype == torch.float64)
]


def judge(
    backend: str, dtype: torch.dtype, arguments: dict[str, Any], function: Any = max_sim, **options: Any
) -> None:
    """`arguments` are in `dtype`; the truth is the reference on the same numbers in float64."""
    call = partial(function, **options)
    fused = value_and_gradients(partial(call, backend=backend), arguments)
    plain = value_and_gradients(partial(call, backend="reference"), arguments)
    truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
    assert_close_to_truth(fused, plain, truth, dtype)
    assert fused["output 0"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.usefixtures("nan_filled_allocations")
@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_option_against_float64(backend: str, device: str, dtype: torch.dtype, shape: str) -> None:
    for mask in (False, True):
        arguments = make_inputs(SHAPES[shape], dtype=dtype, device=device, mask=mask)
        for direction, reduce, mask_mode in itertools.product(DIRECTIONS, REDUCTIONS, MASK_MODES[: 1 + mask]):
            judge(backend, dtype, arguments, direction=direction, reduce=reduce, mask_mode=mask_mode)


@pytest.mark.usefixtures("nan_filled_allocations")
@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
def test_packed_against_float64(backend: str, device: str, dtype: torch.dtype) -> None:
    for shape in ("one", "ragged", "long"):
        arguments = pack(make_inputs(SHAPES[shape], dtype=dtype, device=device, mask=True))
        for direction, reduce in itertools.product(DIRECTIONS, REDUCTIONS):
            judge(backend, dtype, arguments, max_sim_varlen, direction=direction, reduce=reduce)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_packed_is_masked(backend: str, device: str) -> None:
    """Packed sequences score as the padded ones they come from, whatever bound of their length is given."""
    arguments = make_inputs(SHAPES["ragged"], device=device, mask=True)
    packed = pack(arguments, torch.int64)
    for direction, reduce in itertools.product(DIRECTIONS, REDUCTIONS):
        options = {"direction": direction, "reduce": reduce, "backend": backend}
        expected = max_sim(**arguments, **options)
        for bounds in ({}, {"max_seqlen_regions": 37, "max_seqlen_words": 19}, {"max_seqlen_words": 40_000}):
            found = max_sim_varlen(**packed, **bounds, **options)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_choices_of_four_bytes(backend: str, device: str) -> None:
    """A bound beyond 2^15 widens what is saved, and nothing else."""
    packed = pack(make_inputs(SHAPES["ragged"], device=device, mask=True))
    for direction in DIRECTIONS:
        call = partial(max_sim_varlen, direction=direction, backend=backend)
        bounds = {"max_seqlen_regions": 1 << 15, "max_seqlen_words": 1 << 15}
        narrow, wide = value_and_gradients(call, packed), value_and_gradients(partial(call, **bounds), packed)
        torch.testing.assert_close(wide, narrow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_many_tiles(backend: str, device: str) -> None:
    for shape in (Shape(9, 33, 70, 65, 24), Shape(130, 3, 3, 600, 8), Shape(2, 2, 400, 1400, 8)):
        arguments = make_inputs(shape, device=device, mask=True)
        for direction in DIRECTIONS:
            judge(backend, torch.float32, arguments, direction=direction, reduce="mean")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(backend: str, direction: str) -> None:
    arguments = make_inputs(Shape(3, 4, 5, 3, 4), dtype=torch.float64, mask=True)
    inputs = arguments.pop("regions"), arguments.pop("words")
    for mask_mode, reduce in itertools.product(MASK_MODES, REDUCTIONS):
        options = {**arguments, "direction": direction, "mask_mode": mask_mode, "reduce": reduce}
        call = partial(max_sim, **options, backend=backend)
        assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_each_gradient_alone(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["ragged"], device=device, mask=True)
    for direction in DIRECTIONS:
        call = partial(max_sim, direction=direction, backend=backend)
        everything = value_and_gradients(call, arguments)
        for name in ("regions", "words"):
            alone = {
                k: v if k in (name, "region_mask", "word_mask") else v.detach() for k, v in arguments.items()
            }
            found = value_and_gradients(call, alone)
            torch.testing.assert_close(found[f"d {name}"], everything[f"d {name}"], rtol=0, atol=0)


class TestGolden:
    @pytest.mark.parametrize(("backend", "device", "dtype"), PRECISE)
    def test_alignment_of_image_fragments(self, backend: str, device: str, dtype: torch.dtype) -> None:
        """DVSA's scores: the hard alignment of Karpathy & Fei-Fei is MaxSim's sum over words."""
        mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
        images, captions = (t.to(device, dtype) for t in (det(3, 4, 5, a=0.37), det(3, 6, 5, a=0.53)))
        scores = max_sim(images, captions, word_mask=mask.to(device), backend=backend)
        golden = [
            [12.74680145, 10.33750721, 5.76387411],
            [13.72352479, 9.33008119, 5.75864809],
            [12.27860086, 8.92894857, 4.95169404],
        ]
        # The golden values are printed to 8 digits after the point.
        expected = torch.tensor(golden, dtype=dtype, device=device)
        torch.testing.assert_close(scores, expected, rtol=TOLERANCE[dtype], atol=5.1e-9)
        lengths = F.pad(mask.sum(1).cumsum(0), (1, 0)).int().to(device)
        packed = captions[mask.to(device)]
        bounds = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=device)
        found = max_sim_varlen(images.reshape(12, 5), packed, bounds, lengths, backend=backend)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=5.1e-9)

    @pytest.mark.parametrize(("backend", "device"), BACKENDS)
    def test_by_hand(self, backend: str, device: str) -> None:
        """Two regions, three words, one of them masked; similarities [[1, 2], [3, -1], [9, 9]] of words with regions."""
        regions = torch.eye(2, device=device)[None]
        words = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [9.0, 9.0]]], device=device)
        word_mask = torch.tensor([[True, True, False]], device=device)
        for options, expected in (
            ({}, 5.0),
            ({"reduce": "mean"}, 2.5),
            ({"direction": "regions"}, 5.0),
            ({"direction": "both", "reduce": "mean"}, 2.5),
            ({"region_mask": torch.tensor([[False, True]], device=device)}, 1.0),
            ({"region_mask": torch.tensor([[False, True]], device=device), "mask_mode": "zero"}, 2.0),
        ):
            found = max_sim(regions, words, word_mask=word_mask, backend=backend, **options)
            assert float(found) == pytest.approx(expected), options


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_is_what_pylate_computes(backend: str, device: str) -> None:
    """colbert_scores multiplies the document tokens by their mask, and sums the query tokens by theirs."""
    arguments = make_inputs(SHAPES["ragged"], device=device, mask=True)
    regions, words = arguments["regions"].detach(), arguments["words"].detach()
    documents = regions * arguments["region_mask"][..., None]
    tokens = torch.einsum("ctd,brd->cbtr", words, documents).max(-1).values
    expected = (tokens * arguments["word_mask"][:, None]).sum(-1).T
    found = max_sim(**arguments, mask_mode="zero", backend=backend)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
class TestProperties:
    sizes = st.integers(1, 9)
    lengths = st.integers(1, 40)

    @given(images=sizes, captions=sizes, regions=lengths, words=lengths, width=sizes, seed=sizes)
    def test_order_does_not_matter(
        self, backend: str, images: int, captions: int, regions: int, words: int, width: int, seed: int
    ) -> None:
        arguments = make_inputs(Shape(images, captions, regions, words, width), mask=True, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(n, generator=generator) for n in (images, captions, regions, words)]
        shuffled = {
            name: value[orders[0]][:, orders[2]]
            if name.startswith("region")
            else value[orders[1]][:, orders[3]]
            for name, value in arguments.items()
        }
        for direction in DIRECTIONS:
            expected = max_sim(**arguments, direction=direction, backend=backend)[orders[0]][:, orders[1]]
            found = max_sim(**shuffled, direction=direction, backend=backend)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @given(images=sizes, captions=sizes, regions=lengths, words=lengths, width=sizes)
    def test_swapping_the_sides(
        self, backend: str, images: int, captions: int, regions: int, words: int, width: int
    ) -> None:
        a = make_inputs(Shape(images, captions, regions, words, width), mask=True)
        swapped: dict[str, Tensor] = {
            "regions": a["words"],
            "words": a["regions"],
            "region_mask": a["word_mask"],
            "word_mask": a["region_mask"],
        }
        for direction, back in zip(DIRECTIONS, ("regions", "words", "both"), strict=True):
            for mask_mode in MASK_MODES:
                options = {"mask_mode": mask_mode, "reduce": "mean", "backend": backend}
                forth = max_sim(**a, direction=direction, **options)
                found = max_sim(**swapped, direction=back, **options).T
                torch.testing.assert_close(found, forth, rtol=1e-5, atol=1e-5)

    @given(images=sizes, regions=lengths, words=lengths, scale=st.floats(0.01, 100))
    def test_scaling_one_side(
        self, backend: str, images: int, regions: int, words: int, scale: float
    ) -> None:
        arguments = make_inputs(Shape(images, 3, regions, words, 5), dtype=torch.float64, mask=True)
        expected = max_sim(**arguments, backend=backend) * scale
        arguments["words"] = arguments["words"] * scale
        torch.testing.assert_close(max_sim(**arguments, backend=backend), expected, rtol=1e-9, atol=1e-9)
