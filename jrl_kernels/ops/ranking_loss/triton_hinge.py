"""Triton kernels of the ranking loss: violations and hardest candidates of rows and columns in one sweep, and the gradient.

A kernel sees one block of the matrix of scores, whose rows and columns it counts from 0: row i's positive is column i + diagonal,
the first `paired_rows` rows and `paired_columns` columns have one. `base` is margin - s_ii. A NaN violates and is the hardest
of all, so that it reaches the loss.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_tiles import equal_ids, logits_tile, reduce_sum, result_so_far, tile_of_program

NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def candidates(x_exclude_ptr, y_exclude_ptr, row, column, rows, columns, diagonal, EXCLUDE: tl.constexpr):
    candidate = (row < rows)[:, None] & (column < columns)[None, :]
    candidate = candidate & (row[:, None] + diagonal != column[None, :])
    if EXCLUDE:
        candidate = candidate & (equal_ids(x_exclude_ptr, y_exclude_ptr, row, column, rows, columns) == 0)
    return candidate


@triton.jit
def violations(s, candidate, base_ptr, index, paired, AXIS: tl.constexpr):
    """margin - s_ii + s_ij, and whether it counts, for rows (AXIS 1) or columns (AXIS 0)."""
    has_positive = index < paired
    base = tl.load(base_ptr + index, mask=has_positive, other=0.0)
    v = s + tl.expand_dims(base, AXIS)
    return v, candidate & tl.expand_dims(has_positive, AXIS) & ((v <= 0.0) == 0)


@triton.jit
def store_sums(s, candidate, base_ptr, sums_ptr, counts_ptr, index, slot, paired, AXIS: tl.constexpr):
    v, violated = violations(s, candidate, base_ptr, index, paired, AXIS)
    at = slot.to(tl.int64) * paired + index
    tl.store(sums_ptr + at, tl.sum(tl.where(violated, v, 0.0), AXIS), mask=index < paired)
    tl.store(counts_ptr + at, tl.sum(violated.to(tl.int32), AXIS), mask=index < paired)


@triton.jit
def ranking_loss_sums_kernel(
    x_ptr, y_ptr, scale_ptr, x_exclude_ptr, y_exclude_ptr, row_base_ptr, column_base_ptr,
    row_values_ptr, row_numbers_ptr, column_values_ptr, column_numbers_ptr,
    rows, columns, stride, depth, paired_rows, paired_columns, diagonal,
    FROM_SCORES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXCLUDE: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sums and counts of the violations of rows [column tile, paired row] and of columns [row tile, paired column]."""
    row_tile, column_tile = tile_of_program(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    s = logits_tile(
        x_ptr, y_ptr, tl.load(scale_ptr), row, column, rows, columns, stride, depth,
        FROM_SCORES, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    candidate = candidates(x_exclude_ptr, y_exclude_ptr, row, column, rows, columns, diagonal, EXCLUDE)
    if ROWS:
        store_sums(
            s, candidate, row_base_ptr, row_values_ptr, row_numbers_ptr, row, column_tile, paired_rows, 1
        )
    if COLUMNS:
        store_sums(
            s, candidate, column_base_ptr, column_values_ptr, column_numbers_ptr, column, row_tile, paired_columns, 0
        )  # fmt: skip


@triton.jit
def store_hardest(s, candidate, values_ptr, numbers_ptr, index, other, slot, paired, AXIS: tl.constexpr):
    lost = s != s
    key = tl.where(candidate, tl.where(lost, float("inf"), s), float("-inf"))
    top = tl.max(key, AXIS)
    first = candidate & (key == tl.expand_dims(top, AXIS))
    place = tl.min(tl.where(first, tl.expand_dims(other, 1 - AXIS), NO_INDEX), AXIS)
    at = slot.to(tl.int64) * paired + index
    value = top + tl.sum(tl.where(candidate & lost, s, 0.0), AXIS)
    tl.store(values_ptr + at, value, mask=index < paired)
    tl.store(numbers_ptr + at, place, mask=index < paired)


@triton.jit
def ranking_loss_hardest_kernel(
    x_ptr, y_ptr, scale_ptr, x_exclude_ptr, y_exclude_ptr,
    row_values_ptr, row_numbers_ptr, column_values_ptr, column_numbers_ptr,
    rows, columns, stride, depth, paired_rows, paired_columns, diagonal,
    FROM_SCORES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXCLUDE: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Largest candidate and its lowest index, of rows [column tile, paired row] and of columns [row tile, paired column]."""
    row_tile, column_tile = tile_of_program(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    s = logits_tile(
        x_ptr, y_ptr, tl.load(scale_ptr), row, column, rows, columns, stride, depth,
        FROM_SCORES, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    candidate = candidates(x_exclude_ptr, y_exclude_ptr, row, column, rows, columns, diagonal, EXCLUDE)
    if ROWS:
        store_hardest(s, candidate, row_values_ptr, row_numbers_ptr, row, column, column_tile, paired_rows, 1)
    if COLUMNS:
        store_hardest(
            s, candidate, column_values_ptr, column_numbers_ptr, column, row, row_tile, paired_columns, 0
        )


@triton.jit
def ranking_loss_sums_reduce_kernel(
    values_ptr, numbers_ptr, value_ptr, number_ptr, slots, length, origin,
    CARRIED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Partials [slots, length] to sums and counts [length], added to what they hold where CARRIED."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    reduce_sum(values_ptr, value_ptr, slots, length, at, inside, CARRIED, BLOCK_SLOTS)
    if CARRIED:
        count = tl.load(number_ptr + at, mask=inside, other=0)
    else:
        count = tl.zeros([BLOCK], dtype=tl.int64)
    slot = tl.arange(0, BLOCK_SLOTS)
    for start in range(0, slots, BLOCK_SLOTS):
        some = (slot + start).to(tl.int64)[:, None]
        mask = (some < slots) & inside[None, :]
        part = tl.load(numbers_ptr + some * length + at[None, :], mask=mask, other=0)
        count += tl.sum(part.to(tl.int64), 0)
    tl.store(number_ptr + at, count, mask=inside)


@triton.jit
def ranking_loss_hardest_reduce_kernel(
    values_ptr, numbers_ptr, value_ptr, number_ptr, slots, length, origin,
    CARRIED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Partials [slots, length] to maxima and indices [length], which count from `origin`; of ties what came first stays."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    before = result_so_far(value_ptr, at, inside, float("-inf"), CARRIED)
    lost = tl.where(before != before, before, 0.0)
    top = tl.where(before != before, float("inf"), before)
    if CARRIED:
        place = tl.load(number_ptr + at, mask=inside, other=-1)
    else:
        place = tl.full([BLOCK], -1, tl.int64)
    slot = tl.arange(0, BLOCK_SLOTS)
    for start in range(0, slots, BLOCK_SLOTS):
        some = (slot + start).to(tl.int64)[:, None]
        offset = some * length + at[None, :]
        mask = (some < slots) & inside[None, :]
        value = tl.load(values_ptr + offset, mask=mask, other=float("-inf"))
        index = tl.load(numbers_ptr + offset, mask=mask, other=NO_INDEX)
        key = tl.where(value != value, float("inf"), value)
        higher = tl.max(key, 0)
        lowest = tl.min(tl.where(key == higher[None, :], index, NO_INDEX), 0)
        lost += tl.sum(tl.where(value != value, value, 0.0), 0)
        place = tl.where(higher > top, lowest.to(tl.int64) + origin, place)
        top = tl.where(higher > top, higher, top)
    tl.store(value_ptr + at, top + lost, mask=inside)
    tl.store(number_ptr + at, place, mask=inside)


@triton.jit
def ranking_loss_gradient_kernel(
    x_ptr, y_ptr, scale_ptr, x_exclude_ptr, y_exclude_ptr, row_base_ptr, column_base_ptr,
    grad_x_ptr, grad_y_ptr, unit_ptr, out_ptr,
    rows, columns, stride, depth, paired_rows, paired_columns, diagonal, out_stride,
    FROM_SCORES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXCLUDE: tl.constexpr, UNIT: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """G = dL/ds of a block, over `unit` where UNIT, in the dtype of out_ptr; zero on the diagonal."""
    row_tile, column_tile = tile_of_program(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    s = logits_tile(
        x_ptr, y_ptr, tl.load(scale_ptr), row, column, rows, columns, stride, depth,
        FROM_SCORES, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    candidate = candidates(x_exclude_ptr, y_exclude_ptr, row, column, rows, columns, diagonal, EXCLUDE)
    g = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if ROWS:
        _, violated = violations(s, candidate, row_base_ptr, row, paired_rows, 1)
        grad = tl.load(grad_x_ptr + row, mask=row < paired_rows, other=0.0)
        g += tl.where(violated, grad[:, None], 0.0)
    if COLUMNS:
        _, violated = violations(s, candidate, column_base_ptr, column, paired_columns, 0)
        grad = tl.load(grad_y_ptr + column, mask=column < paired_columns, other=0.0)
        g += tl.where(violated, grad[None, :], 0.0)
    if UNIT:
        g /= tl.load(unit_ptr)
    offset = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + offset, g.to(out_ptr.dtype.element_ty), mask=inside)
