"""The Triton kernels of the Gumbel ops compile for every architecture without spills, as users launch them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.triton_aot import CAPABILITIES, Compiled, Compiler, assert_sound

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
MATRIX_KERNELS = {
    "gumbel_assign_statistics_kernel",
    "gumbel_assign_pool_kernel",
    "gumbel_assign_gradient_kernel",
    "gumbel_assign_spread_kernel",
    "gumbel_embed_mixture_kernel",
    "gumbel_embed_gradient_kernel",
    "gumbel_embed_codebook_kernel",
}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def assign(
    dtype: torch.dtype,
    groups: int,
    tokens: int,
    depth: int,
    width: int,
    hard: bool,
    mask: bool,
    tf32: bool = False,
) -> None:
    from jrl_kernels.ops.gumbel import triton_kernel

    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    images = 256
    operands: Any = (
        meta(images, groups, depth, dtype=dtype),
        meta(images, tokens, depth, dtype=dtype),
        meta(images, tokens, width, dtype=dtype),
        meta(),
        meta(dtype=torch.int64),
        meta(images, tokens, dtype=torch.bool) if mask else None,
    )
    options: Any = (0.9, 1.0, hard)
    saved = list(triton_kernel.assign_forward(*operands, *options))
    arguments: Any = (*saved[:1], *operands, *saved[1:], [True] * 4, *options)
    triton_kernel.assign_backward(*arguments)


def embed(dtype: torch.dtype, rows: int, codes: int, width: int, k: int, hard: bool) -> None:
    from jrl_kernels.ops.gumbel import triton_kernel

    operands: Any = (meta(rows, codes, dtype=dtype), meta(codes, width, dtype=dtype), meta(dtype=torch.int64))
    options: Any = (k, 0.9, hard)
    saved = list(triton_kernel.embed_forward(*operands, *options))
    arguments: Any = (*saved[:1], *operands, *saved[1:], [True, True], *options)
    triton_kernel.embed_backward(*arguments)


CASES: dict[str, Callable[[], None]] = {
    "GroupViT, bfloat16": partial(assign, BFLOAT16, 64, 196, 384, 384, True, False),
    "GroupViT, float16, soft, ragged": partial(assign, FLOAT16, 70, 49, 100, 90, False, True),
    "GroupViT, tf32, soft, masked": partial(assign, FLOAT32, 64, 196, 384, 384, False, True, tf32=True),
    "few groups, float32, ragged": partial(assign, FLOAT32, 8, 63, 50, 51, False, True),
    "dVAE, bfloat16": partial(embed, BFLOAT16, 8192, 8192, 128, 1, False),
    "Vx2Text, float32": partial(embed, FLOAT32, 100, 527, 100, 5, True),
}


def multiplies(case: str, compiled: Compiled) -> bool:
    """Whether the kernel is to use the matrix units: float32 without TF32 may not, and a gather has no product."""
    gathers = compiled.kernel == "gumbel_assign_spread_kernel" and compiled.settings["HARD"]
    return compiled.kernel in MATRIX_KERNELS and "float32" not in case and not gathers


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(compile_case: Compiler, case: str, capability: tuple[int, int]) -> None:
    found = compile_case(case, capability)
    names = {compiled.kernel for compiled in found}
    head = (
        "gumbel_assign_gradient_kernel"
        if "VAE" not in case and "Vx2" not in case
        else "gumbel_embed_gradient_kernel"
    )
    assert head in names
    assert_sound(found, capability, partial(multiplies, case))
