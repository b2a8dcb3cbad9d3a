"""What the Triton kernels over a matrix of scores share: a tile of logits, and the listed pairs.

Each program of a matrix kernel owns one BLOCK_M x BLOCK_N tile of the logits s = scale * x @ y.T: it never leaves the registers,
in float32, and ends as partial sums per row and column or as a tile of dL/ds. No atomics: partials lie side by side, one slot a
tile, and a second kernel adds them in a fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_of_program(row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile of this program; GROUP row tiles at a time share the columns that the L2 cache holds."""
    program = tl.program_id(0)
    band = GROUP * column_tiles
    first = program // band * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % band
    return first + inside % height, inside // height


@triton.jit
def logits_tile(
    x_ptr, y_ptr, scale, row, column, row_end, column_end, columns, depth,
    FROM_SCORES: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale * x[row] @ y[column].T in float32; with FROM_SCORES, x_ptr is a matrix [rows, columns] of scores.

    Rows and columns past the end hold something finite or a repeated value: the caller masks them.
    """
    if FROM_SCORES:
        inside = (row < row_end)[:, None] & (column < column_end)[None, :]
        offset = row[:, None].to(tl.int64) * columns + column[None, :]
        return tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) * scale
    row = tl.minimum(row, row_end - 1).to(tl.int64)
    column = tl.minimum(column, column_end - 1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x_tile_ptr = x_ptr + row[:, None] * depth + d[None, :]
    y_tile_ptr = y_ptr + column[None, :] * depth + d[:, None]
    dot = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, depth, BLOCK_D):
        if EVEN_D:
            x_tile = tl.load(x_tile_ptr)
            y_tile = tl.load(y_tile_ptr)
        else:
            x_tile = tl.load(x_tile_ptr, mask=d[None, :] < depth - start, other=0.0)
            y_tile = tl.load(y_tile_ptr, mask=d[:, None] < depth - start, other=0.0)
        dot = tl.dot(x_tile, y_tile, dot, input_precision=PRECISION)
        x_tile_ptr += BLOCK_D
        y_tile_ptr += BLOCK_D
    return dot * scale


@triton.jit
def equal_ids(x_ids_ptr, y_ids_ptr, row, column, row_end, column_end):
    x_ids = tl.load(x_ids_ptr + row, mask=row < row_end, other=0)
    y_ids = tl.load(y_ids_ptr + column, mask=column < column_end, other=0)
    return x_ids[:, None] == y_ids[None, :]


@triton.jit
def finite_or_zero(value):
    return tl.where(tl.abs(value) == float("inf"), 0.0, value)


@triton.jit
def result_so_far(result_ptr, at, inside, empty, CARRIED: tl.constexpr):
    """What earlier chunks of columns have left in a result, `empty` before the first."""
    if CARRIED:
        return tl.load(result_ptr + at, mask=inside, other=empty)
    else:
        return tl.full(at.shape, empty, tl.float32)


@triton.jit
def reduce_sum(
    partials_ptr, result_ptr, slots, length, at, inside, CARRIED: tl.constexpr, BLOCK_SLOTS: tl.constexpr
):
    total = result_so_far(result_ptr, at, inside, 0.0, CARRIED)
    slot = tl.arange(0, BLOCK_SLOTS)
    for start in range(0, slots, BLOCK_SLOTS):
        some = (slot + start).to(tl.int64)[:, None]
        total += tl.sum(
            tl.load(
                partials_ptr + some * length + at[None, :], mask=(some < slots) & inside[None, :], other=0.0
            ),
            0,
        )
    tl.store(result_ptr + at, total, mask=inside)


@triton.jit
def pair_logits_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, pair_rows_ptr, pair_columns_ptr, out_ptr, pairs, rows, columns, depth,
    FROM_SCORES: tl.constexpr, BIAS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The logits of listed pairs; NaN for a pair that does not exist.

    The diagonal of a tile of their rows and columns: the same matrix instructions as in the sweep round as it does, which in TF32
    keeps log-sum-exp - s from going astray where one candidate has all the probability.
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    row = tl.load(pair_rows_ptr + pair, mask=inside, other=0)
    column = tl.load(pair_columns_ptr + pair, mask=inside, other=0)
    exists = inside & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    row = tl.where(exists, row, 0)
    column = tl.where(exists, column, 0)
    if FROM_SCORES:
        s = tl.load(x_ptr + row * columns + column, mask=exists, other=0.0).to(tl.float32) * tl.load(
            scale_ptr
        )
    else:
        tile = logits_tile(
            x_ptr, y_ptr, tl.load(scale_ptr), row, column, rows, columns, columns, depth,
            False, EVEN_D, PRECISION, BLOCK, BLOCK, BLOCK_D,
        )  # fmt: skip
        i = tl.arange(0, BLOCK)
        s = tl.sum(tl.where(i[:, None] == i[None, :], tile, 0.0), 1)
    if BIAS:
        s += tl.load(bias_ptr)
    tl.store(out_ptr + pair, tl.where(exists, s, float("nan")), mask=inside)


@triton.jit
def scatter_kernel(
    pair_rows_ptr, pair_columns_ptr, value_ptr, unit_ptr, out_ptr,
    pairs, row_start, row_end, column_start, column_end, out_stride,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite the listed pairs that lie in a tile of G."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    row = tl.load(pair_rows_ptr + pair, mask=inside, other=-1)
    column = tl.load(pair_columns_ptr + pair, mask=inside, other=-1)
    inside = inside & (row >= row_start) & (row < row_end) & (column >= column_start) & (column < column_end)
    value = tl.load(value_ptr + pair, mask=inside, other=0.0)
    if UNIT:
        value /= tl.load(unit_ptr)
    offset = (row - row_start) * out_stride + (column - column_start)
    tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=inside)
