"""The Triton kernels of the contrastive losses compile for every architecture without spills, as users launch them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from jrl_kernels._positives import Positives
from jrl_kernels._sweep import Source
from jrl_kernels.ops.info_nce.sweep import Options, Upstream
from tests.triton_aot import CAPABILITIES, Compiled, Compiler, assert_sound, faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
MATRIX_KERNELS = {
    "info_nce_statistics_kernel",
    "info_nce_gradient_kernel",
    "sigmoid_contrastive_sums_kernel",
    "sigmoid_contrastive_gradient_kernel",
    "pair_logits_kernel",
}
KERNELS = MATRIX_KERNELS | {"info_nce_reduce_kernel", "sigmoid_contrastive_reduce_kernel", "scatter_kernel"}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(length: int) -> Tensor:
    return meta(length, dtype=torch.int64)


def sources(dtype: torch.dtype, rows: int, columns: int, depth: int | None, bias: bool = False) -> Source:
    offset = meta() if bias else None
    if depth is None:
        return Source(None, None, meta(rows, columns, dtype=dtype), meta(), offset)
    return Source(meta(rows, depth, dtype=dtype), meta(columns, depth, dtype=dtype), None, meta(), offset)


def positives(by_ids: bool, rows: int, columns: int) -> Positives:
    if by_ids:
        return Positives(x_ids=ids(rows), y_ids=ids(columns))
    return Positives(rows=ids(rows), columns=ids(rows))


def softmax(
    dtype: torch.dtype,
    rows: int = 65536,
    columns: int = 65536,
    depth: int | None = 768,
    by_ids: bool = False,
    exclude: bool = False,
    direction: str = "both",
    multi_positive: str = "mean",
    details: bool = False,
    tf32: bool = False,
) -> None:
    """One forward sweep and one tile of the backward."""
    from jrl_kernels.ops.info_nce import triton_kernel

    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    source = sources(dtype, rows, columns, depth)
    by_row, by_column = direction != "y_to_x", direction != "x_to_y"
    options = Options(
        positives(by_ids, rows, columns),
        ids(rows) if exclude else None,
        ids(columns) if exclude else None,
        by_row,
        by_column,
        multi_positive,
        details,
    )
    triton_kernel.statistics(source, options)
    sides: list[Tensor | None] = []
    for wanted, length in ((by_row, rows), (by_column, columns)):
        sides += (
            [meta(length), meta(length), meta(length) if by_ids else None] if wanted else [None, None, None]
        )
    sides.append(None if by_ids else meta(rows))
    upstream = Upstream(*sides)
    tile, block = triton_kernel.softmax_gradient(source, options, upstream)
    tile(0, min(block[0], rows), 0, min(block[1], columns))


def sigmoid(
    dtype: torch.dtype,
    rows: int = 65536,
    columns: int = 65536,
    depth: int | None = 768,
    by_ids: bool = False,
    bias: bool = True,
    tf32: bool = False,
) -> None:
    from jrl_kernels.ops.info_nce import triton_kernel

    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    source = sources(dtype, rows, columns, depth, bias)
    pairs = positives(by_ids, rows, columns)
    _, pair_logits = triton_kernel.sigmoid_sums(source, pairs)
    tile, block = triton_kernel.sigmoid_gradient(source, pairs, meta(rows), pair_logits)
    tile(0, min(block[0], rows), 0, min(block[1], columns))


def spilling() -> None:
    """A kernel with more live values than registers."""
    from tests.triton_aot import overfull_kernel

    overfull_kernel[(1,)](meta(64, 256), ROWS=64, COLUMNS=256, num_warps=1)


RAGGED = {"rows": 1000, "columns": 999, "depth": 771}
SINGLE = {"rows": 1, "columns": 1, "depth": 1}
EVERYTHING = {"by_ids": True, "exclude": True, "details": True}

CASES: dict[str, Callable[[], None]] = {
    "bfloat16": partial(softmax, BFLOAT16),
    "bfloat16, rows alone": partial(softmax, BFLOAT16, direction="x_to_y"),
    "bfloat16, columns alone, ragged": partial(softmax, BFLOAT16, direction="y_to_x", **RAGGED),
    "bfloat16, exclusion and details": partial(softmax, BFLOAT16, exclude=True, details=True),
    "bfloat16, ids, mean": partial(softmax, BFLOAT16, by_ids=True),
    "bfloat16, everything, sum, ragged": partial(
        softmax, BFLOAT16, multi_positive="sum", **EVERYTHING, **RAGGED
    ),
    "bfloat16, one pair": partial(softmax, BFLOAT16, **EVERYTHING, **SINGLE),
    "float16, ragged": partial(softmax, FLOAT16, **RAGGED),
    "tf32": partial(softmax, FLOAT32, tf32=True),
    "tf32, everything, mean, ragged": partial(softmax, FLOAT32, tf32=True, **EVERYTHING, **RAGGED),
    "float32": partial(softmax, FLOAT32),
    "float32, everything, sum, ragged": partial(
        softmax, FLOAT32, multi_positive="sum", **EVERYTHING, **RAGGED
    ),
    "scores, bfloat16": partial(softmax, BFLOAT16, rows=8192, columns=8192, depth=None),
    "scores, float32, everything, sum, ragged": partial(
        softmax, FLOAT32, rows=1000, columns=999, depth=None, multi_positive="sum", **EVERYTHING
    ),
    "sigmoid, bfloat16": partial(sigmoid, BFLOAT16),
    "sigmoid, float16, ids, ragged": partial(sigmoid, FLOAT16, by_ids=True, **RAGGED),
    "sigmoid, tf32": partial(sigmoid, FLOAT32, tf32=True),
    "sigmoid, float32, ids, no bias": partial(sigmoid, FLOAT32, by_ids=True, bias=False),
    "spilling": spilling,
}
GOOD = [name for name in CASES if name != "spilling"]


def multiplies(case: str, compiled: Compiled) -> bool:
    """Whether the kernel is to use the matrix units: float32 without TF32 may not, scores have no product."""
    return compiled.kernel in MATRIX_KERNELS and not case.startswith(
        ("float32", "sigmoid, float32", "scores")
    )


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("case", GOOD)
def test_compiles_without_spills(compile_case: Compiler, case: str, capability: tuple[int, int]) -> None:
    found = compile_case(case, capability)
    kernels = {compiled.kernel for compiled in found}
    assert kernels <= KERNELS
    gradient = (
        "sigmoid_contrastive_gradient_kernel" if case.startswith("sigmoid") else "info_nce_gradient_kernel"
    )
    assert gradient in kernels
    assert_sound(found, capability, partial(multiplies, case))


@pytest.mark.parametrize("case", ["bfloat16", "float16, ragged"])
def test_fits_the_shared_memory_of_smaller_chips(compile_case: Compiler, case: str) -> None:
    assert not [fault for compiled in compile_case(case, (8, 9)) for fault in faults(compiled, (8, 9), False)]


def test_two_blocks_share_a_multiprocessor(compile_case: Compiler) -> None:
    """At 9.0 the exps of one block are to overlap the products of another: half of the registers and shared memory each."""
    for compiled in compile_case("bfloat16", (9, 0)):
        if compiled.kernel == "info_nce_statistics_kernel":
            assert compiled.registers * 32 * compiled.settings["num_warps"] * 2 <= 65536, compiled
            assert (compiled.shared + 1024) * 2 <= 228 << 10, compiled


def test_a_spill_is_caught(compile_case: Compiler) -> None:
    (compiled,) = compile_case("spilling", (9, 0))
    (fault,) = faults(compiled, (9, 0), matrix=False)
    assert "local memory" in fault
    assert "no wgmma instruction" in faults(compiled, (9, 0), matrix=True)


def test_too_much_shared_memory_is_caught() -> None:
    compiled = Compiled("kernel", {}, 100, 0, 200 << 10, 1)
    assert not faults(compiled, (9, 0), True)
    assert "200" not in str(faults(compiled, (9, 0), True))
    assert faults(compiled, (8, 0), True) == ["204800 bytes of shared memory, the chip has 166912"]


def test_a_failing_case_is_an_error(compile_case: Compiler) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'no such case'"):
        compile_case("no such case", (9, 0))
