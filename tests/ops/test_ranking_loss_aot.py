"""The Triton kernels of the ranking loss compile for every architecture without spills, as users launch them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from jrl_kernels._sweep import Source
from jrl_kernels.ops.ranking_loss.sweep import Options
from tests.triton_aot import CAPABILITIES, Compiled, Compiler, assert_sound

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]

MATRIX_KERNELS = {
    "ranking_loss_sums_kernel",
    "ranking_loss_hardest_kernel",
    "ranking_loss_gradient_kernel",
    "pair_logits_kernel",
}
KERNELS = MATRIX_KERNELS | {
    "ranking_loss_sums_reduce_kernel",
    "ranking_loss_hardest_reduce_kernel",
    "order_scores_kernel",
}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def sweep(
    dtype: torch.dtype,
    rows: int = 65536,
    columns: int = 65536,
    depth: int | None = 768,
    metric: str = "dot",
    exclude: bool = False,
    tf32: bool = False,
) -> None:
    """Forward sweeps of the sum and of the hardest, and one block of the sum's backward."""
    from jrl_kernels.ops.ranking_loss import triton_kernel

    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    if depth is None:
        source = Source(None, None, meta(rows, columns, dtype=dtype), meta())
    else:
        source = Source(meta(rows, depth, dtype=dtype), meta(columns, depth, dtype=dtype), None, meta())
    x_ids = meta(rows, dtype=torch.int64) if exclude else None
    y_ids = meta(columns, dtype=torch.int64) if exclude else None
    pairs = min(rows, columns)
    options = Options(metric, False, x_ids, y_ids, True, True, pairs, 0)
    triton_kernel.positive_scores(source, options)
    base = meta(pairs)
    triton_kernel.statistics(source, options, base)
    triton_kernel.statistics(source, options._replace(hardest=True), base)
    tile, block = triton_kernel.gradient(source, options, base, meta(pairs), meta(pairs))
    tile(0, min(block[0], rows), 0, min(block[1], columns))


RAGGED = {"rows": 1000, "columns": 999, "depth": 771}

CASES: dict[str, Callable[[], None]] = {
    "bfloat16": partial(sweep, torch.bfloat16),
    "float16, exclusion, ragged": partial(sweep, torch.float16, exclude=True, **RAGGED),
    "scores, bfloat16, exclusion, ragged": partial(
        sweep, torch.bfloat16, rows=1000, columns=999, depth=None, exclude=True
    ),
    "tf32": partial(sweep, torch.float32, tf32=True),
    "float32, exclusion, ragged": partial(sweep, torch.float32, exclude=True, **RAGGED),
    "order, bfloat16": partial(sweep, torch.bfloat16, rows=4096, columns=4096, metric="order"),
}


def multiplies(case: str, compiled: Compiled) -> bool:
    """Whether the kernel is to use the matrix units: float32 without TF32 may not, scores have no product."""
    return compiled.kernel in MATRIX_KERNELS and not case.startswith(("float32", "order", "scores"))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(compile_case: Compiler, case: str, capability: tuple[int, int]) -> None:
    found = compile_case(case, capability)
    kernels = {compiled.kernel for compiled in found}
    assert kernels <= KERNELS
    assert {"ranking_loss_sums_kernel", "ranking_loss_hardest_kernel"} <= kernels
    assert "ranking_loss_gradient_kernel" in kernels
    assert_sound(found, capability, partial(multiplies, case))
