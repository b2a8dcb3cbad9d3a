"""The Triton kernels of late interaction compile for every architecture without spills, as users launch them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from jrl_kernels.ops.max_sim.sides import Side, choice_dtype
from tests.triton_aot import CAPABILITIES, Compiled, Compiler, assert_sound

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]

KERNELS = {"max_sim_forward_kernel", "max_sim_items_kernel", "max_sim_found_kernel"}
MATRIX_KERNELS = KERNELS - {"max_sim_items_kernel"}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def late_interaction(
    dtype: torch.dtype,
    images: int = 1024,
    captions: int = 1024,
    regions: int = 128,
    words: int = 128,
    depth: int = 128,
    direction: str = "words",
    mask: bool = False,
    zero: bool = False,
    tf32: bool = False,
) -> None:
    from jrl_kernels.ops.max_sim import triton_kernel

    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"

    def side(groups: int, length: int) -> Side:
        rows = meta(groups * length, depth, dtype=dtype)
        valid = meta(groups * length, dtype=torch.bool) if mask else None
        return Side(rows, meta(groups + 1, dtype=torch.int64), valid, length)

    image, caption = side(images, regions), side(captions, words)
    triton_kernel.forward(image, caption, direction != "regions", direction != "words", zero)
    choice = meta(images, caption.rows.shape[0], dtype=choice_dtype(regions))
    triton_kernel.backward(caption, image, choice, meta(images, captions), True, True)


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = {"images": 100, "captions": 99, "regions": 301, "words": 77}
DEEP = {"regions": 1024, "words": 32, "depth": 1024}
CASES: dict[str, Callable[[], None]] = {
    "bfloat16": partial(late_interaction, BFLOAT16),
    "bfloat16, both, masks, ragged": partial(
        late_interaction, BFLOAT16, direction="both", mask=True, **RAGGED
    ),
    "bfloat16, zeros, ragged": partial(late_interaction, BFLOAT16, mask=True, zero=True, **RAGGED),
    "float16, both, zeros, unaligned": partial(
        late_interaction, FLOAT16, direction="both", mask=True, zero=True, regions=1024, depth=771
    ),
    "float16, zeros, deep": partial(late_interaction, FLOAT16, mask=True, zero=True, **DEEP),
    "tf32, both, masks": partial(late_interaction, FLOAT32, direction="both", mask=True, tf32=True),
    "float32, both, masks": partial(late_interaction, FLOAT32, direction="both", mask=True),
}


def multiplies(case: str, compiled: Compiled) -> bool:
    """Whether the kernel is to use the matrix units: float32 without TF32 may not."""
    return compiled.kernel in MATRIX_KERNELS and not case.startswith("float32")


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(compile_case: Compiler, case: str, capability: tuple[int, int]) -> None:
    found = compile_case(case, capability)
    assert {compiled.kernel for compiled in found} == KERNELS
    assert_sound(found, capability, partial(multiplies, case))


def test_two_blocks_share_a_multiprocessor(compile_case: Compiler) -> None:
    """At 9.0 the comparisons of one block are to overlap the products of another: half of the registers and memory each."""
    for compiled in compile_case("bfloat16", (9, 0)):
        if compiled.kernel == "max_sim_forward_kernel":
            assert compiled.registers * 32 * compiled.settings["num_warps"] * 2 <= 65536, compiled
            assert (compiled.shared + 1024) * 2 <= 228 << 10, compiled
