"""Triton kernels of word-region attention where an image has more keys than a tile holds.

Sums over keys are taken once, tile after tile; with their log-sum-exp (or, `hard`, the index of the maximum) known, every other
tile of attention stands alone. The contexts of a block of queries and images, and what comes back from their norms, are
products of whole matrices between the kernels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_tiles import LN_2, LOG2_E, finite_or_zero
from .triton_scores import (
    AREA,
    EPSILON,
    NO_INDEX,
    dot_tile,
    prenormalized,
    prenormalized_gradient,
    queries_of_program,
    store_in_range,
    with_mask,
)


@triton.jit(do_not_specialize=AREA)
def word_region_statistics_kernel(
    query_ptr, key_ptr, query_value_ptr, key_value_ptr, query_mask_ptr, key_mask_ptr, scale_ptr,
    match_ptr, log_sum_exp_ptr, index_ptr,
    row_tiles, image_start, caption_start, caption_end, captions, words, regions, depth, value_depth,
    SHARED: tl.constexpr, HARD: tl.constexpr, LEAKY: tl.constexpr, NORM: tl.constexpr,
    QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of [images, captions * words], where asked for: log_sum_exp, the attention's mean of u, and with HARD its index."""
    program = tl.program_id(0)
    image = (program // row_tiles).to(tl.int64) + image_start
    rows = tl.cast(captions, tl.int64) * words
    row, inside = queries_of_program(
        program % row_tiles, caption_start, caption_end, words, NORM, BLOCK_M, BLOCK_T
    )
    valid = with_mask(inside, query_mask_ptr, row, QUERY_MASK)
    scale = tl.load(scale_ptr) * LOG2_E
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    match = tl.zeros([BLOCK_M], tl.float32)
    index = tl.full([BLOCK_M], -1, tl.int32)
    for start in range(0, regions, BLOCK_R):
        region = start + tl.arange(0, BLOCK_R)
        present = with_mask(region < regions, key_mask_ptr, image * regions + region, KEY_MASK)
        kept = valid[:, None] & present[None, :]
        a = dot_tile(
            query_ptr, key_ptr + image * regions * depth, row, region, rows, regions, depth, kept,
            EVEN_D, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        bits = tl.where(kept, prenormalized(a, kept, LEAKY, NORM, BLOCK_T) * scale, float("-inf"))
        if match_ptr is not None:
            u = a
            if not SHARED:
                u = dot_tile(
                    query_value_ptr, key_value_ptr + image * regions * value_depth, row, region, rows, regions, value_depth,
                    kept, EVEN_E, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
                )  # fmt: skip
        if HARD:
            # NaN is the largest: it must reach the match.
            order = tl.where(bits == bits, bits, float("inf"))
            highest = tl.max(order, 1)
            first = tl.min(tl.where(kept & (order == highest[:, None]), region[None, :], NO_INDEX), 1)
            better = highest > top
            top = tl.where(better, highest, top)
            index = tl.where(better, first, index)
            total = tl.where(index >= 0, 1.0, 0.0)
            if match_ptr is not None:
                found = tl.where(bits == bits, u, float("nan"))
                found = tl.sum(tl.where(region[None, :] == first[:, None], found, 0.0), 1)
                match = tl.where(better, found, match)
        else:
            higher = tl.maximum(top, tl.max(bits, 1))
            reference = finite_or_zero(higher)
            earlier = tl.exp2(top - reference)
            e = tl.exp2(bits - reference[:, None])
            total = total * earlier + tl.sum(e, 1)
            if match_ptr is not None:
                match = match * earlier + tl.sum(e * u, 1)
            top = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    at = image * rows + row
    if log_sum_exp_ptr is not None:
        log_sum_exp = (finite_or_zero(top) + tl.log2(total)) * LN_2
        tl.store(log_sum_exp_ptr + at, tl.where(empty, 0.0, log_sum_exp), mask=inside)
    if match_ptr is not None:
        tl.store(match_ptr + at, match / total, mask=inside)
    if index_ptr is not None:
        tl.store(index_ptr + at, index, mask=inside)


@triton.jit(do_not_specialize=AREA)
def word_region_tile_kernel(
    query_ptr, key_ptr, query_value_ptr, key_value_ptr, query_mask_ptr, key_mask_ptr, scale_ptr,
    match_ptr, log_sum_exp_ptr, norm_ptr, index_ptr, grad_ptr, spread_ptr, length_ptr, unit_ptr,
    alpha_ptr, part_ptr, da_ptr, du_ptr, weighted_ptr,
    row_tiles, image_start, images, caption_start, caption_end, captions, words, regions, depth, value_depth,
    GRADIENT: tl.constexpr, SHARED: tl.constexpr, COSINE: tl.constexpr, HARD: tl.constexpr, LEAKY: tl.constexpr,
    NORM: tl.constexpr, QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of tiles [captions * words, images, regions]: alpha, or with GRADIENT the gradients.

    Of each query, in parts by tile of keys: the attention's mean of u, or dL/dattention_scale through it. `spread` holds the
    product of the unit vector along each query's context with each value, over a length of the image.
    """
    program = tl.program_id(0)
    key_tiles = tl.cdiv(regions, BLOCK_R)
    key_tile = program % key_tiles
    nth = (program // key_tiles // row_tiles).to(tl.int64)
    image = nth + image_start
    rows = tl.cast(captions, tl.int64) * words
    row, inside = queries_of_program(
        program // key_tiles % row_tiles, caption_start, caption_end, words, NORM, BLOCK_M, BLOCK_T
    )
    region = key_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = with_mask(inside, query_mask_ptr, row, QUERY_MASK)
    present = with_mask(region < regions, key_mask_ptr, image * regions + region, KEY_MASK)
    kept = valid[:, None] & present[None, :]
    at = image * rows + row

    a = dot_tile(
        query_ptr, key_ptr + image * regions * depth, row, region, rows, regions, depth, kept,
        EVEN_D, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    x = prenormalized(a, kept, LEAKY, NORM, BLOCK_T)
    scale = tl.load(scale_ptr)
    bits = x * (scale * LOG2_E)
    if HARD:
        chosen = region[None, :] == tl.load(index_ptr + at, mask=valid, other=-1)[:, None]
        alpha = tl.where(chosen, tl.where(bits == bits, 1.0, float("nan")), 0.0)
    else:
        reference = tl.load(log_sum_exp_ptr + at, mask=valid, other=0.0) * LOG2_E
        alpha = tl.where(kept, tl.exp2(bits - reference[:, None]), 0.0)
    u = a
    if not SHARED:
        u = dot_tile(
            query_value_ptr, key_value_ptr + image * regions * value_depth, row, region, rows, regions, value_depth, kept,
            EVEN_E, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
        )  # fmt: skip

    first_row = tl.cast(caption_start, tl.int64) * words
    out = ((row - first_row) * images + nth)[:, None] * regions + region[None, :]
    stored = inside[:, None] & (region < regions)[None, :]
    height = tl.cast(caption_end, tl.int64) * words - first_row
    part = part_ptr + (key_tile.to(tl.int64) * images + nth) * height + (row - first_row)
    if not GRADIENT:
        operand = alpha.to(alpha_ptr.dtype.element_ty)
        tl.store(alpha_ptr + out, operand, mask=stored)
        # The same rounded attention above and below the fraction: its error turns the context, it does not stretch it.
        tl.store(part, tl.sum(operand.to(tl.float32) * u, 1), mask=inside)
    else:
        slope = tl.load(grad_ptr + at, mask=valid, other=0.0)
        match = tl.load(match_ptr + at, mask=valid, other=0.0)
        if UNIT:
            slope /= tl.load(unit_ptr)
        # sum alpha dL/dalpha: what the fraction's numerator and its norm contribute cancels, unless the norm was clamped.
        mean = slope * match
        if COSINE:
            norm = tl.load(norm_ptr + at, mask=valid, other=1.0)
            slope /= norm
            clamped = norm <= EPSILON
            mean = tl.where(clamped, mean, 0.0)
            turned = tl.where(clamped, 0.0, match)
            spread = tl.load(spread_ptr + out, mask=stored, other=0.0).to(tl.float32)
            dalpha = slope[:, None] * (u - (turned * tl.load(length_ptr + nth))[:, None] * spread)
            tl.store(alpha_ptr + out, alpha.to(alpha_ptr.dtype.element_ty), mask=stored)
            weighted = (-0.5 * slope * turned / norm)[:, None] * alpha
            store_in_range(weighted_ptr + out, weighted, stored)
        else:
            dalpha = slope[:, None] * u
        direct = slope[:, None] * alpha
        if HARD:
            da = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        else:
            dz = alpha * (dalpha - mean[:, None])
            tl.store(part, tl.sum(dz * x, 1), mask=inside)
            da = prenormalized_gradient(scale * dz, x, a, LEAKY, NORM, BLOCK_T)
        if SHARED:
            da += direct
        else:
            store_in_range(du_ptr + out, direct, stored)
        store_in_range(da_ptr + out, tl.where(kept, da, 0.0), stored)
