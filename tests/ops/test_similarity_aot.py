"""The Triton kernels of the similarity ops compile for every architecture without spills, as users launch them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from jrl_kernels.ops.similarity.search import Listed, Pairs, Rounding
from tests.triton_aot import CAPABILITIES, Compiler, assert_sound

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]

ROWS, COLUMNS = 100_000, 50_001


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem(dtype: torch.dtype, metric: str, depth: int) -> tuple[Pairs, Rounding]:
    second = (
        (meta(ROWS, 128, dtype=dtype), meta(COLUMNS, 128, dtype=dtype)) if metric in ("min", "max") else ()
    )
    pairs = Pairs(meta(ROWS, depth, dtype=dtype), meta(COLUMNS, depth, dtype=dtype), metric, *second)
    vectors = meta(ROWS), meta(COLUMNS), meta(ROWS), meta(COLUMNS)
    norms: tuple[Tensor | None, Tensor | None] = None, None
    if metric == "cosine":
        norms = meta(ROWS, dtype=torch.float64), meta(COLUMNS, dtype=torch.float64)
    return pairs, Rounding(*vectors, 1e-4, *norms)


def ranks(dtype: torch.dtype, metric: str, depth: int = 512) -> None:
    from jrl_kernels.ops.similarity import triton_kernel

    pairs, bounds = problem(dtype, metric, depth)
    group = Listed(*(meta(ROWS, dtype=torch.int64) for _ in range(3)))
    best = triton_kernel.best(pairs, bounds, group)
    counts = meta(ROWS, dtype=torch.int64)
    triton_kernel.count(
        meta(4096, 2048), 4096, 2048, pairs, bounds, group, meta(ROWS), meta(ROWS), best, counts
    )


def topk(dtype: torch.dtype, metric: str, k: int, exclude: bool, depth: int = 512) -> None:
    from jrl_kernels.ops.similarity import triton_kernel

    pairs, bounds = problem(dtype, metric, depth)
    ids = (meta(ROWS, dtype=torch.int64), meta(COLUMNS, dtype=torch.int64)) if exclude else None
    keys = meta(ROWS, k, dtype=torch.int64)
    triton_kernel.select(meta(4096, 2048), 4096, 2048, pairs, bounds, ids, keys)


def order(dtype: torch.dtype) -> None:
    from jrl_kernels import _triton_order

    x, y = meta(1000, 513, dtype=dtype), meta(999, 513, dtype=dtype)
    _triton_order.scores(x, y, meta(1000, 999))
    _triton_order.accumulate_gradients(meta(1000, 999), x, y, meta(1000, 513), meta(999, 513))


CASES: dict[str, Callable[[], None]] = {
    "ranks, cosine, bfloat16": partial(ranks, torch.bfloat16, "cosine"),
    "ranks, order, float32": partial(ranks, torch.float32, "order", depth=1000),
    "topk, cosine, float16": partial(topk, torch.float16, "cosine", 10, exclude=False),
    "topk, dot, float32, largest k": partial(topk, torch.float32, "dot", 2048, exclude=True),
    "agreement, bfloat16": partial(topk, torch.bfloat16, "min", 33, exclude=True),
    "order, bfloat16": partial(order, torch.bfloat16),
}
KERNELS = {
    "ranks": {"similarity_best_kernel", "similarity_count_kernel"},
    "topk": {"similarity_select_kernel"},
    "agreement": {"similarity_select_kernel"},
    "order": {"order_scores_kernel", "order_gradient_kernel"},
}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(compile_case: Compiler, case: str, capability: tuple[int, int]) -> None:
    found = compile_case(case, capability)
    assert {compiled.kernel for compiled in found} == KERNELS[case.split(",")[0]]
    assert_sound(found, capability, lambda compiled: False)
