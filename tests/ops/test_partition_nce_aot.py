"""The Triton kernel of noise-contrastive estimation compiles for every architecture without spills, as users launch it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests.triton_aot import CAPABILITIES, Compiler, assert_sound

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]


def loss(
    dtype: torch.dtype, depth: int = 128, positives: int = 1, negatives: int = 1024, masked: bool = False
) -> None:
    from jrl_kernels.ops.partition_nce import triton_kernel

    def meta(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    mask = meta(256, positives, kind=torch.bool) if masked else None
    index = meta(256, positives, kind=torch.int64), meta(256, negatives, kind=torch.int64)
    for gradient in (True, False):
        triton_kernel.forward(
            meta(256, depth, kind=dtype), meta(232067, depth, kind=dtype), *index, mask, meta(), meta(), gradient
        )  # fmt: skip


CASES: dict[str, Callable[[], None]] = {
    "bfloat16": partial(loss, torch.bfloat16),
    "float32, ragged": partial(loss, torch.float32, 129, 33, 61, masked=True),
    "float32, wide": partial(loss, torch.float32, 2048),
    "float16, widest": partial(loss, torch.float16, 8192, 3, 5),
}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(compile_case: Compiler, case: str, capability: tuple[int, int]) -> None:
    found = compile_case(case, capability)
    assert [compiled.settings["GRADIENT"] for compiled in found] == [True, False]
    assert_sound(found, capability, lambda compiled: False)
