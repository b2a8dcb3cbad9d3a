"""Triton kernels of the softmax contrastive losses: statistics of rows and columns in one sweep, and the gradient."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_math import log_sum_exp
from ..._triton_tiles import (
    LN_2,
    LOG2_E,
    equal_ids,
    finite_or_zero,
    logits_tile,
    reduce_sum,
    result_so_far,
    tile_of_program,
)

NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def store_positives(
    s, positive, at, inside, partials_ptr, plane, AXIS: tl.constexpr, POSITIVES: tl.constexpr
):
    if POSITIVES == "sum":
        tl.store(
            partials_ptr + plane + at, log_sum_exp(tl.where(positive, s, float("-inf")), AXIS), mask=inside
        )
    else:
        tl.store(partials_ptr + plane + at, tl.sum(tl.where(positive, s, 0.0), AXIS), mask=inside)


@triton.jit
def store_details(s, candidate, other, at, inside, partials_ptr, plane, AXIS: tl.constexpr):
    """Planes 2 to 5: maximum, its index (as the bits of an int32), expectation of s, and number of candidates."""
    maximum = tl.max(s, AXIS)
    top = tl.expand_dims(maximum, AXIS)
    index = tl.min(tl.where(candidate & (s == top), tl.expand_dims(other, 1 - AXIS), NO_INDEX), AXIS)
    weight = tl.exp2((s - finite_or_zero(top)) * LOG2_E)
    total = tl.sum(weight, AXIS)
    moment = tl.sum(tl.where(s == float("-inf"), 0.0, weight * s), AXIS)
    tl.store(partials_ptr + 2 * plane + at, maximum, mask=inside)
    tl.store(partials_ptr + 3 * plane + at, index.to(tl.int32).to(tl.float32, bitcast=True), mask=inside)
    tl.store(partials_ptr + 4 * plane + at, tl.where(total == 0.0, 0.0, moment / total), mask=inside)
    tl.store(partials_ptr + 5 * plane + at, tl.sum(candidate.to(tl.float32), AXIS), mask=inside)


@triton.jit
def info_nce_statistics_kernel(
    x_ptr, y_ptr, scale_ptr, x_ids_ptr, y_ids_ptr, x_exclude_ptr, y_exclude_ptr, row_partials_ptr, column_partials_ptr,
    rows, columns, column_start, column_end, depth,
    FROM_SCORES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIVES: tl.constexpr,
    EXCLUDE: tl.constexpr, DETAILS: tl.constexpr, RAGGED: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Partials of rows [plane, column tile, row] and of columns [plane, row tile, column - column_start].

    Plane 0 is the log-sum-exp, plane 1 what POSITIVES ("", "mean" or "sum") asks for, planes 2 to 5 are the DETAILS.
    """
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(column_end - column_start, BLOCK_N)
    row_tile, column_tile = tile_of_program(row_tiles, column_tiles, GROUP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_start + column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < rows
    column_inside = column < column_end

    s = logits_tile(
        x_ptr, y_ptr, tl.load(scale_ptr), row, column, rows, column_end, columns, depth,
        FROM_SCORES, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    candidate = row_inside[:, None] & column_inside[None, :]
    if POSITIVES != "":
        positive = candidate & equal_ids(x_ids_ptr, y_ids_ptr, row, column, rows, column_end)
    if EXCLUDE:
        excluded = equal_ids(x_exclude_ptr, y_exclude_ptr, row, column, rows, column_end)
        if POSITIVES != "":
            excluded = excluded & (positive == 0)
        candidate = candidate & (excluded == 0)
    if RAGGED or EXCLUDE:
        s = tl.where(candidate, s, float("-inf"))

    row_plane = tl.cast(column_tiles, tl.int64) * rows
    row_at = column_tile.to(tl.int64) * rows + row
    width = column_end - column_start
    column_plane = tl.cast(row_tiles, tl.int64) * width
    column_at = row_tile.to(tl.int64) * width + (column - column_start)
    # An exp for each direction: one for both would need its fallback's registers, and with them half of the occupancy.
    if ROWS:
        tl.store(row_partials_ptr + row_at, log_sum_exp(s, 1), mask=row_inside)
        if POSITIVES != "":
            store_positives(s, positive, row_at, row_inside, row_partials_ptr, row_plane, 1, POSITIVES)
        if DETAILS:
            store_details(s, candidate, column, row_at, row_inside, row_partials_ptr, row_plane, 1)
    if COLUMNS:
        tl.store(column_partials_ptr + column_at, log_sum_exp(s, 0), mask=column_inside)
        if POSITIVES != "":
            store_positives(
                s, positive, column_at, column_inside, column_partials_ptr, column_plane, 0, POSITIVES
            )
        if DETAILS:
            store_details(s, candidate, row, column_at, column_inside, column_partials_ptr, column_plane, 0)


@triton.jit
def reduce_log_sum_exp(
    partials_ptr, result_ptr, slots, length, at, inside, CARRIED: tl.constexpr, BLOCK_SLOTS: tl.constexpr
):
    """Log-sum-exp over the slots and, where CARRIED, the result so far; stored in its place and returned."""
    top = result_so_far(result_ptr, at, inside, float("-inf"), CARRIED)
    total = tl.exp2((top - finite_or_zero(top)) * LOG2_E)
    slot = tl.arange(0, BLOCK_SLOTS)
    for start in range(0, slots, BLOCK_SLOTS):
        some = (slot + start).to(tl.int64)[:, None]
        value = tl.load(
            partials_ptr + some * length + at[None, :],
            mask=(some < slots) & inside[None, :],
            other=float("-inf"),
        )
        higher = tl.maximum(top, tl.max(value, 0))
        reference = finite_or_zero(higher)
        kept = tl.where(top == higher, 1.0, tl.exp2((top - reference) * LOG2_E))
        total = total * kept + tl.sum(tl.exp2((value - reference[None, :]) * LOG2_E), 0)
        top = higher
    result = finite_or_zero(top) + tl.log2(total) * LN_2
    tl.store(result_ptr + at, result, mask=inside)
    return result


@triton.jit
def reduce_maximum(
    partials_ptr,
    plane,
    results_ptr,
    results_plane,
    slots,
    length,
    at,
    inside,
    CARRIED: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Planes 2 and 3: the maximum and the lowest index that has it, -1 where there is no candidate."""
    top = result_so_far(results_ptr + 2 * results_plane, at, inside, float("-inf"), CARRIED)
    if CARRIED:
        place = result_so_far(results_ptr + 3 * results_plane, at, inside, 0.0, CARRIED).to(
            tl.int32, bitcast=True
        )
        place = tl.where(place >= 0, place, NO_INDEX)
    else:
        place = tl.full(at.shape, NO_INDEX, tl.int32)
    slot = tl.arange(0, BLOCK_SLOTS)
    for start in range(0, slots, BLOCK_SLOTS):
        some = (slot + start).to(tl.int64)[:, None]
        offset = some * length + at[None, :]
        mask = (some < slots) & inside[None, :]
        value = tl.load(partials_ptr + 2 * plane + offset, mask=mask, other=float("-inf"))
        index = tl.load(partials_ptr + 3 * plane + offset, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        higher = tl.max(value, 0)
        lowest = tl.min(tl.where(mask & (value == higher[None, :]), index, NO_INDEX), 0)
        better = (higher > top) | ((higher == top) & (lowest < place))
        top = tl.where(better, higher, top)
        place = tl.where(better, lowest, place)
    place = tl.where(place == NO_INDEX, -1, place)
    tl.store(results_ptr + 2 * results_plane + at, top, mask=inside)
    tl.store(results_ptr + 3 * results_plane + at, place.to(tl.float32, bitcast=True), mask=inside)


@triton.jit
def reduce_expectation(
    partials_ptr, plane, results_ptr, results_plane, before, after, slots, length, at, inside, CARRIED: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Plane 4: means of the slots weighted by their share exp(log_sum_exp of the slot - log_sum_exp of all)."""
    reference = finite_or_zero(after)
    mean = result_so_far(results_ptr + 4 * results_plane, at, inside, 0.0, CARRIED)
    total = mean * tl.exp2((before - reference) * LOG2_E)
    slot = tl.arange(0, BLOCK_SLOTS)
    for start in range(0, slots, BLOCK_SLOTS):
        some = (slot + start).to(tl.int64)[:, None]
        offset = some * length + at[None, :]
        mask = (some < slots) & inside[None, :]
        value = tl.load(partials_ptr + offset, mask=mask, other=float("-inf"))
        means = tl.load(partials_ptr + 4 * plane + offset, mask=mask, other=0.0)
        total += tl.sum(tl.exp2((value - reference[None, :]) * LOG2_E) * means, 0)
    tl.store(results_ptr + 4 * results_plane + at, total, mask=inside)


@triton.jit
def info_nce_reduce_kernel(
    partials_ptr, results_ptr, slots, length, results_length, CARRIED: tl.constexpr,
    POSITIVES: tl.constexpr, DETAILS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Partials [plane, slots, length] to results [plane, results_length], merged with what they hold where CARRIED."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    plane = tl.cast(slots, tl.int64) * length
    results_plane = tl.cast(results_length, tl.int64)
    before = result_so_far(results_ptr, at, inside, float("-inf"), CARRIED)
    after = reduce_log_sum_exp(partials_ptr, results_ptr, slots, length, at, inside, CARRIED, BLOCK_SLOTS)
    if POSITIVES == "mean":
        reduce_sum(
            partials_ptr + plane, results_ptr + results_plane, slots, length, at, inside, CARRIED, BLOCK_SLOTS
        )
    elif POSITIVES == "sum":
        reduce_log_sum_exp(
            partials_ptr + plane, results_ptr + results_plane, slots, length, at, inside, CARRIED, BLOCK_SLOTS
        )
    if DETAILS:
        reduce_maximum(
            partials_ptr, plane, results_ptr, results_plane, slots, length, at, inside, CARRIED, BLOCK_SLOTS
        )
        reduce_expectation(
            partials_ptr,
            plane,
            results_ptr,
            results_plane,
            before,
            after,
            slots,
            length,
            at,
            inside,
            CARRIED,
            BLOCK_SLOTS,
        )
        reduce_sum(
            partials_ptr + 5 * plane,
            results_ptr + 5 * results_plane,
            slots,
            length,
            at,
            inside,
            CARRIED,
            BLOCK_SLOTS,
        )


@triton.jit
def load_bits(pointer, index, end):
    """Log-sum-exps in bits rather than nats; an index past the end repeats the last."""
    return tl.load(pointer + tl.minimum(index, end - 1)) * LOG2_E


@triton.jit
def info_nce_gradient_kernel(
    x_ptr, y_ptr, scale_ptr, x_ids_ptr, y_ids_ptr, x_exclude_ptr, y_exclude_ptr,
    grad_x_ptr, log_sum_exp_x_ptr, positive_x_ptr, grad_y_ptr, log_sum_exp_y_ptr, positive_y_ptr, unit_ptr, out_ptr,
    row_start, row_end, column_start, column_end, columns, out_stride, depth,
    FROM_SCORES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIVES: tl.constexpr,
    EXCLUDE: tl.constexpr, UNIT: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """G = dL/ds of logits [row_start:row_end, column_start:column_end], over `unit` where UNIT, in the dtype of out_ptr."""
    row_tiles = tl.cdiv(row_end - row_start, BLOCK_M)
    column_tiles = tl.cdiv(column_end - column_start, BLOCK_N)
    row_tile, column_tile = tile_of_program(row_tiles, column_tiles, GROUP)
    row = row_start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_start + column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < row_end
    column_inside = column < column_end

    s = logits_tile(
        x_ptr, y_ptr, tl.load(scale_ptr), row, column, row_end, column_end, columns, depth,
        FROM_SCORES, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    bits = s * LOG2_E
    if ROWS:
        grad_x = tl.load(grad_x_ptr + row, mask=row_inside, other=0.0)
        row_bits = load_bits(log_sum_exp_x_ptr, row, row_end)
    if COLUMNS:
        grad_y = tl.load(grad_y_ptr + column, mask=column_inside, other=0.0)
        column_bits = load_bits(log_sum_exp_y_ptr, column, column_end)
    # Not summed onto zeros: adding those is not free, and costs the registers that let two blocks share a multiprocessor.
    if ROWS and COLUMNS:
        g = grad_x[:, None] * tl.exp2(bits - row_bits[:, None])
        g += grad_y[None, :] * tl.exp2(bits - column_bits[None, :])
    elif ROWS:
        g = grad_x[:, None] * tl.exp2(bits - row_bits[:, None])
    else:
        g = grad_y[None, :] * tl.exp2(bits - column_bits[None, :])
    if POSITIVES != "":
        positive = equal_ids(x_ids_ptr, y_ids_ptr, row, column, row_end, column_end)
    if EXCLUDE:
        excluded = equal_ids(x_exclude_ptr, y_exclude_ptr, row, column, row_end, column_end)
        if POSITIVES != "":
            excluded = excluded & (positive == 0)
        g = tl.where(excluded, 0.0, g)
    if POSITIVES == "mean":
        if ROWS:
            share = tl.load(positive_x_ptr + row, mask=row_inside, other=0.0)
            g -= tl.where(positive, share[:, None], 0.0)
        if COLUMNS:
            share = tl.load(positive_y_ptr + column, mask=column_inside, other=0.0)
            g -= tl.where(positive, share[None, :], 0.0)
    elif POSITIVES == "sum":
        if ROWS:
            positive_bits = load_bits(positive_x_ptr, row, row_end)
            g -= tl.where(positive, grad_x[:, None] * tl.exp2(bits - positive_bits[:, None]), 0.0)
        if COLUMNS:
            positive_bits = load_bits(positive_y_ptr, column, column_end)
            g -= tl.where(positive, grad_y[None, :] * tl.exp2(bits - positive_bits[None, :]), 0.0)
    if UNIT:
        g /= tl.load(unit_ptr)
    offset = (row - row_start).to(tl.int64)[:, None] * out_stride + (column - column_start)[None, :]
    tl.store(
        out_ptr + offset, g.to(out_ptr.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :]
    )
