"""Triton kernel of late interaction's forward: maxima and choices of one or both directions from one tile of similarities.

A program owns one group of x (the regions of an image, say) and GROUPS groups of y (captions), of which it visits
BLOCK_Y / GROUPS items each at a time: it sees all items of both sides, so that what it stores is final.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_tiles import logits_tile, tile_of_program

NO_PLACE = tl.constexpr(2147483647)


@triton.jit
def larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def first_maximum(s, place, AXIS: tl.constexpr):
    """The maximum, NaN where there is one, and the least place that has it; candidates alone have a place below NO_PLACE."""
    top = tl.reduce(s, AXIS, larger_or_nan)
    reached = (s == tl.expand_dims(top, AXIS)) | (s != s)
    return top, tl.min(tl.where(reached, place, NO_PLACE), AXIS)


@triton.jit
def transposed_rows(pointer, row, d, depth, EVEN_D: tl.constexpr):
    if EVEN_D:
        return tl.load(pointer + row[None, :] * depth + d[:, None])
    else:
        return tl.load(pointer + row[None, :] * depth + d[:, None], mask=(d < depth)[:, None], other=0.0)


@triton.jit
def items_of(start, end, place, mask_ptr, MASK: tl.constexpr, ZERO: tl.constexpr):
    """Rows of a group's items, whether each exists, whether it counts, and its place among the candidates of a search."""
    row = start + place
    exists = row < end
    live = exists
    if MASK:
        live = exists & tl.load(mask_ptr + row, mask=exists, other=0).to(tl.int1)
    candidate = exists if ZERO else live
    return row, exists, live, tl.where(candidate, place.to(tl.int32), NO_PLACE)


@triton.jit
def masked_similarity(s, live, place, ZERO: tl.constexpr):
    """Of an item that does not count: 0 where it competes all the same, -inf where it does not."""
    candidate = place != NO_PLACE
    if ZERO:
        return tl.where(live, s, tl.where(candidate, 0.0, float("-inf")))
    else:
        return tl.where(candidate, s, float("-inf"))


@triton.jit
def taken(place, start, mask_ptr, MASK: tl.constexpr, ZERO: tl.constexpr):
    """What the backward needs: -1 where there was no candidate, or where a masked item has won with its 0."""
    found = place != NO_PLACE
    if MASK and ZERO:
        found = found & tl.load(mask_ptr + start + place, mask=found, other=0).to(tl.int1)
    return tl.where(found, place, -1)


@triton.jit
def max_sim_forward_kernel(
    x_ptr, y_ptr, x_offsets_ptr, y_offsets_ptr, x_mask_ptr, y_mask_ptr,
    y_sums_ptr, x_choice_ptr, x_sums_ptr, y_choice_ptr, x_groups, y_groups, x_rows, y_rows, depth,
    Y_PICKS: tl.constexpr, X_PICKS: tl.constexpr, X_MASK: tl.constexpr, Y_MASK: tl.constexpr, ZERO: tl.constexpr,
    ONE_X: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Y_PICKS: sums [x group, y group] and choices of x's items [x group, row of y]; X_PICKS: the same with x and y exchanged.

    ONE_X: no group of x has more than BLOCK_X items, WHOLE_D: depth <= BLOCK_D; together they keep x's tile over the whole loop.
    X_PICKS needs groups of y of at most BLOCK_Y / GROUPS items.
    """
    WIDTH: tl.constexpr = BLOCK_Y // GROUPS
    x_group, y_tile = tile_of_program(x_groups, tl.cdiv(y_groups, GROUPS), GROUP)
    x_start = tl.load(x_offsets_ptr + x_group)
    x_end = tl.load(x_offsets_ptr + x_group + 1)
    x_last = tl.maximum(x_end, 1)
    x_length = BLOCK_X if ONE_X else (x_end - x_start).to(tl.int32)

    slot = tl.arange(0, BLOCK_Y)
    y_group = tl.cast(y_tile, tl.int64) * GROUPS + slot // WIDTH
    y_group_at = tl.minimum(y_group, y_groups - 1)
    y_start = tl.load(y_offsets_ptr + y_group_at)
    y_end = tl.load(y_offsets_ptr + y_group_at + 1)
    y_end = tl.where(y_group < y_groups, y_end, y_start)
    longest = tl.max(y_end - y_start, 0).to(tl.int32)
    group = tl.cast(y_tile, tl.int64) * GROUPS + tl.arange(0, GROUPS)

    d = tl.arange(0, BLOCK_D)
    x_lane = tl.arange(0, BLOCK_X)
    if ONE_X and WHOLE_D:
        x_tile = transposed_rows(x_ptr, tl.minimum(x_start + x_lane, x_last - 1), d, depth, EVEN_D)
    y_sum = tl.zeros([GROUPS], tl.float32)
    x_sum = tl.zeros([GROUPS], tl.float32)
    # Once even where all of these groups are empty: the choices of x's items are to be written.
    for chunk in range(0, tl.maximum(longest, 1), WIDTH):
        y_row, y_exists, y_live, y_place = items_of(
            y_start, y_end, chunk + slot % WIDTH, y_mask_ptr, Y_MASK, ZERO
        )
        y_at = tl.minimum(y_row, y_rows - 1)
        if WHOLE_D:
            y_tile_ptr = y_ptr + y_at[:, None] * depth + d[None, :]
            if EVEN_D:
                y_values = tl.load(y_tile_ptr)
            else:
                y_values = tl.load(y_tile_ptr, mask=(d < depth)[None, :], other=0.0)
        best = tl.zeros([BLOCK_Y], tl.float32)
        choice = tl.full([BLOCK_Y], NO_PLACE, tl.int32)
        for x_chunk in range(0, x_length, BLOCK_X):
            x_row, x_exists, x_live, x_place = items_of(
                x_start, x_end, x_chunk + x_lane, x_mask_ptr, X_MASK, ZERO
            )
            if WHOLE_D:
                if not ONE_X:
                    x_tile = transposed_rows(x_ptr, tl.minimum(x_row, x_last - 1), d, depth, EVEN_D)
                s = tl.dot(y_values, x_tile, input_precision=PRECISION)
            else:
                s = logits_tile(
                    y_ptr, x_ptr, 1.0, y_at, x_row, y_rows, x_last, 0, depth,
                    False, EVEN_D, PRECISION, BLOCK_Y, BLOCK_X, BLOCK_D,
                )  # fmt: skip
            if Y_PICKS:
                masked = masked_similarity(s, x_live[None, :], x_place[None, :], ZERO)
                top, place = first_maximum(masked, x_place[None, :], 1)
                better = (choice == NO_PLACE) | (top > best) | ((top != top) & (best == best))
                better = better & (place != NO_PLACE)
                best = tl.where(better, top, best)
                choice = tl.where(better, place, choice)
            if X_PICKS:
                s = masked_similarity(s, y_live[:, None], y_place[:, None], ZERO)
                s = tl.reshape(s, [GROUPS, WIDTH, BLOCK_X])
                top, place = first_maximum(s, tl.reshape(y_place, [GROUPS, WIDTH])[:, :, None], 1)
                counts = x_live[None, :] & (place != NO_PLACE)
                x_sum += tl.sum(tl.where(counts, top, 0.0), 1)
                first = tl.load(y_offsets_ptr + tl.minimum(group, y_groups - 1))
                place = taken(tl.where(counts, place, NO_PLACE), first[:, None], y_mask_ptr, Y_MASK, ZERO)
                tl.store(
                    y_choice_ptr + group[:, None] * x_rows + x_row[None, :],
                    place.to(y_choice_ptr.dtype.element_ty),
                    mask=(group < y_groups)[:, None] & x_exists[None, :],
                )
        if Y_PICKS:
            counts = y_live & (choice != NO_PLACE)
            y_sum += tl.sum(tl.reshape(tl.where(counts, best, 0.0), [GROUPS, WIDTH]), 1)
            place = taken(tl.where(counts, choice, NO_PLACE), x_start, x_mask_ptr, X_MASK, ZERO)
            x_choice_row = x_choice_ptr + tl.cast(x_group, tl.int64) * y_rows
            tl.store(x_choice_row + y_row, place.to(x_choice_ptr.dtype.element_ty), mask=y_exists)
    if Y_PICKS:
        tl.store(y_sums_ptr + tl.cast(x_group, tl.int64) * y_groups + group, y_sum, mask=group < y_groups)
    if X_PICKS:
        tl.store(x_sums_ptr + group * x_groups + x_group, x_sum, mask=group < y_groups)
