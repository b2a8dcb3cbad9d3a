"""The Triton kernels of word-region attention compile for every architecture without spills, as users launch them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from jrl_kernels.ops.word_region.sweep import Problem
from tests.triton_aot import CAPABILITIES, Compiled, Compiler, assert_sound, faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
FUSED = {"word_region_forward_kernel", "word_region_gradient_kernel"}
STREAMED = {"word_region_statistics_kernel", "word_region_tile_kernel"}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(
    dtype: torch.dtype,
    images: int,
    regions: int,
    captions: int,
    words: int,
    depth: int,
    values: int | None = None,
    prenormalize: str = "none",
    hard: bool = False,
    cosine: bool = True,
    masks: bool = True,
    tf32: bool = False,
) -> None:
    """The forward and one tile of the backward."""
    from jrl_kernels.ops.word_region import triton_kernel, triton_launch

    triton_launch.TILE_BYTES = 1 << 60
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    keys, queries = meta(images, regions, depth, dtype=dtype), meta(captions, words, depth, dtype=dtype)
    key_values = query_values = None
    if values is not None:
        key_values = meta(images, regions, values, dtype=dtype)
        query_values = meta(captions, words, values, dtype=dtype)
    key_mask = meta(images, regions, dtype=torch.bool) if masks else None
    query_mask = meta(captions, words, dtype=torch.bool) if masks else None
    problem = Problem(
        keys, queries, key_values, query_values, key_mask, query_mask, meta(), prenormalize, hard, cosine
    )
    match, log_sum_exp, norm = triton_kernel.forward(problem)
    some_images, some_captions = triton_kernel.block(problem)
    triton_kernel.gradient_tile(problem, match, match, log_sum_exp, norm, 0, some_images, 0, some_captions)


FEW_KEYS = {"images": 128, "regions": 36, "captions": 128, "words": 32, "depth": 1024}
MANY_KEYS = {"images": 256, "regions": 256, "captions": 256, "words": 32, "depth": 256}
GRID = {"images": 48, "regions": 289, "captions": 48, "words": 18, "depth": 256}
LONG = {"images": 128, "regions": 36, "captions": 128, "words": 50, "depth": 1024}
PATCHES = {"images": 64, "regions": 49, "captions": 64, "words": 20, "depth": 512}

CASES: dict[str, Callable[[], None]] = {
    "bfloat16, few keys": partial(attention, BFLOAT16, **FEW_KEYS),
    "bfloat16, many keys": partial(attention, BFLOAT16, **MANY_KEYS),
    "float16, grid, softmax over words": partial(attention, FLOAT16, prenormalize="softmax", **GRID),
    "bfloat16, few keys, leakyrelu+l2norm": partial(
        attention, BFLOAT16, prenormalize="leakyrelu+l2norm", **FEW_KEYS
    ),
    "bfloat16, long captions, leakyrelu+l2norm": partial(
        attention, BFLOAT16, prenormalize="leakyrelu+l2norm", **LONG
    ),
    "bfloat16, patches, values": partial(attention, BFLOAT16, values=512, **PATCHES),
    "bfloat16, many keys, values, dot": partial(
        attention, BFLOAT16, values=512, cosine=False, **{**MANY_KEYS, "depth": 512}
    ),
    "bfloat16, hard": partial(attention, BFLOAT16, hard=True, cosine=False, masks=False, **FEW_KEYS),
    "tf32, few keys": partial(attention, FLOAT32, tf32=True, **FEW_KEYS),
    "tf32, many keys": partial(attention, FLOAT32, tf32=True, **MANY_KEYS),
    "float32, patches, values": partial(attention, FLOAT32, values=512, **PATCHES),
    "float32, grid, softmax over words": partial(attention, FLOAT32, prenormalize="softmax", **GRID),
}


def multiplies(case: str, compiled: Compiled) -> bool:
    """Whether the kernel is to use the matrix units: float32 without TF32 may not."""
    return compiled.kernel in FUSED | STREAMED and not case.startswith("float32")


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(compile_case: Compiler, case: str, capability: tuple[int, int]) -> None:
    found = compile_case(case, capability)
    kernels = {compiled.kernel for compiled in found}
    assert kernels - {"word_region_gram_kernel"} == (
        STREAMED if any(name in case for name in ("many keys", "grid", "long captions")) else FUSED
    )
    assert_sound(found, capability, partial(multiplies, case))


@pytest.mark.parametrize("case", ["bfloat16, few keys", "bfloat16, many keys"])
def test_fits_the_shared_memory_of_smaller_chips(compile_case: Compiler, case: str) -> None:
    assert not [fault for compiled in compile_case(case, (8, 9)) for fault in faults(compiled, (8, 9), False)]
