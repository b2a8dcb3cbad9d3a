"""Triton kernels of word-region attention where the keys of an image all fit one tile of scores.

A program owns BLOCK_M queries and one image: [BLOCK_M, BLOCK_R] scores in float32 become attention, match and gradients without
leaving the registers, and the norms of contexts come from the image's Gram matrix.
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


@triton.jit
def one_hot(z, region):
    """The lowest index of the maximum of z [BLOCK_M, BLOCK_R]; nothing where all is -inf, NaN where z is."""
    top = tl.max(tl.where(z == z, z, float("inf")), 1)[:, None]
    best = ((z == top) & (z > float("-inf"))) | (z != z)
    first = tl.min(tl.where(best, region[None, :], NO_INDEX), 1)[:, None]
    return tl.where(region[None, :] == first, tl.where(z == z, 1.0, float("nan")), 0.0)


@triton.jit
def through_gram(weight, gram_ptr, length_ptr, region, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr):
    """weight @ V @ V.T for weights >= 0.

    Gram holds the products of unit vectors; what multiplies it has its maximum at 1, so that float16 suits both whatever V holds.
    """
    length = tl.load(length_ptr + region)
    long = weight * length[None, :]
    top = tl.max(long, 1)
    top = tl.where(top > 0, top, 1.0)
    gram = tl.load(gram_ptr + region[:, None] * BLOCK_R + region[None, :])
    share = (long / top[:, None]).to(gram.dtype)
    return tl.dot(share, gram, input_precision=PRECISION) * length[None, :] * top[:, None]


@triton.jit
def word_region_gram_kernel(
    value_ptr, mask_ptr, gram_ptr, length_ptr, regions, depth,
    MASKED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines [BLOCK_R, BLOCK_R] between the values of one image, and their lengths [BLOCK_R]; 0 for those that do not count."""
    image = tl.program_id(0).to(tl.int64)
    region = tl.arange(0, BLOCK_R)
    present = with_mask(region < regions, mask_ptr, image * regions + region, MASKED)
    values = value_ptr + image * regions * depth
    gram = dot_tile(
        values, values, region, region, regions, regions, depth, present[:, None] & present[None, :],
        EVEN_D, "ieee", BLOCK_R, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    diagonal = region[:, None] == region[None, :]
    squares = tl.where(diagonal, gram, 0.0)
    by_row, by_column = tl.sqrt(tl.sum(squares, 1)), tl.sqrt(tl.sum(squares, 0))
    gram /= (
        tl.where(by_row == 0.0, 1.0, by_row)[:, None] * tl.where(by_column == 0.0, 1.0, by_column)[None, :]
    )
    offset = region[:, None] * BLOCK_R + region[None, :]
    tl.store(gram_ptr + image * BLOCK_R * BLOCK_R + offset, gram.to(gram_ptr.dtype.element_ty))
    tl.store(length_ptr + image * BLOCK_R + region, by_column)


@triton.jit
def word_region_forward_kernel(
    query_ptr, key_ptr, query_value_ptr, key_value_ptr, gram_ptr, length_ptr, query_mask_ptr, key_mask_ptr, scale_ptr,
    match_ptr, log_sum_exp_ptr, norm_ptr,
    row_tiles, captions, words, regions, depth, value_depth,
    SHARED: tl.constexpr, COSINE: tl.constexpr, HARD: tl.constexpr, LEAKY: tl.constexpr, NORM: tl.constexpr,
    QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
    PRECISION: tl.constexpr, NORM_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """match, log_sum_exp and norm [images, captions * words]."""
    program = tl.program_id(0)
    image = (program // row_tiles).to(tl.int64)
    rows = tl.cast(captions, tl.int64) * words
    row, inside = queries_of_program(program % row_tiles, 0, captions, words, NORM, BLOCK_M, BLOCK_T)
    region = tl.arange(0, BLOCK_R)
    valid = with_mask(inside, query_mask_ptr, row, QUERY_MASK)
    present = with_mask(region < regions, key_mask_ptr, image * regions + region, KEY_MASK)
    kept = valid[:, None] & present[None, :]

    a = dot_tile(
        query_ptr, key_ptr + image * regions * depth, row, region, rows, regions, depth, kept,
        EVEN_D, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    x = prenormalized(a, kept, LEAKY, NORM, BLOCK_T)
    bits = tl.where(kept, x * (tl.load(scale_ptr) * LOG2_E), float("-inf"))
    top = finite_or_zero(tl.max(bits, 1))
    if HARD:
        weight = one_hot(bits, region)
        log_sum_exp = top * LN_2
    else:
        weight = tl.exp2(bits - top[:, None])
        log_sum_exp = (top + tl.log2(tl.sum(weight, 1))) * LN_2
    total = tl.sum(weight, 1)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    if SHARED:
        u = a
    else:
        u = dot_tile(
            query_value_ptr, key_value_ptr + image * regions * value_depth, row, region, rows, regions, value_depth, kept,
            EVEN_E, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    match = tl.sum(weight * u, 1) / total
    if COSINE:
        spread = through_gram(
            weight,
            gram_ptr + image * BLOCK_R * BLOCK_R,
            length_ptr + image * BLOCK_R,
            region,
            NORM_PRECISION,
            BLOCK_R,
        )
        squared = tl.sum(weight * spread, 1)
        # NaN must survive both.
        norm = tl.sqrt(tl.where(squared < 0.0, 0.0, squared)) / total
        norm = tl.where(empty, 1.0, tl.where(norm < EPSILON, EPSILON, norm))
        match /= norm
    else:
        norm = tl.full([BLOCK_M], 1.0, tl.float32)
    at = image * rows + row
    tl.store(match_ptr + at, tl.where(valid, match, 0.0), mask=inside)
    tl.store(log_sum_exp_ptr + at, tl.where(empty, 0.0, log_sum_exp), mask=inside)
    tl.store(norm_ptr + at, norm, mask=inside)


@triton.jit(do_not_specialize=AREA)
def word_region_gradient_kernel(
    query_ptr, key_ptr, query_value_ptr, key_value_ptr, gram_ptr, length_ptr, query_mask_ptr, key_mask_ptr, scale_ptr,
    grad_ptr, match_ptr, log_sum_exp_ptr, norm_ptr, unit_ptr, da_ptr, du_ptr, alpha_ptr, weighted_ptr, dscale_ptr,
    row_tiles, image_start, images, caption_start, caption_end, captions, words, regions, depth, value_depth,
    SHARED: tl.constexpr, COSINE: tl.constexpr, HARD: tl.constexpr, LEAKY: tl.constexpr, NORM: tl.constexpr,
    QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
    PRECISION: tl.constexpr, NORM_PRECISION: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients [captions of the tile * words, images of the tile, regions], and dL/dattention_scale through each query."""
    program = tl.program_id(0)
    nth = (program // row_tiles).to(tl.int64)
    image = nth + image_start
    rows = tl.cast(captions, tl.int64) * words
    row, inside = queries_of_program(
        program % row_tiles, caption_start, caption_end, words, NORM, BLOCK_M, BLOCK_T
    )
    region = tl.arange(0, BLOCK_R)
    valid = with_mask(inside, query_mask_ptr, row, QUERY_MASK)
    present = with_mask(region < regions, key_mask_ptr, image * regions + region, KEY_MASK)
    kept = valid[:, None] & present[None, :]
    at = image * rows + row
    grad = tl.load(grad_ptr + at, mask=valid, other=0.0)
    if UNIT:
        grad /= tl.load(unit_ptr)

    a = dot_tile(
        query_ptr, key_ptr + image * regions * depth, row, region, rows, regions, depth, kept,
        EVEN_D, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    x = prenormalized(a, kept, LEAKY, NORM, BLOCK_T)
    scale = tl.load(scale_ptr)
    bits = x * (scale * LOG2_E)
    if HARD:
        alpha = one_hot(tl.where(kept, bits, float("-inf")), region)
    else:
        reference = tl.load(log_sum_exp_ptr + at, mask=valid, other=0.0) * LOG2_E
        alpha = tl.where(kept, tl.exp2(bits - reference[:, None]), 0.0)
    if SHARED:
        u = a
    else:
        u = dot_tile(
            query_value_ptr, key_value_ptr + image * regions * value_depth, row, region, rows, regions, value_depth, kept,
            EVEN_E, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
        )  # fmt: skip

    first_row = tl.cast(caption_start, tl.int64) * words
    height = tl.cast(caption_end, tl.int64) * words - first_row
    out = ((row - first_row) * images + nth)[:, None] * regions + region[None, :]
    stored = inside[:, None] & (region < regions)[None, :]
    if COSINE:
        norm = tl.load(norm_ptr + at, mask=valid, other=1.0)
        match = tl.load(match_ptr + at, mask=valid, other=0.0)
        slope = grad / norm
        # A norm that was clamped has no gradient.
        dsquare = tl.where(norm <= EPSILON, 0.0, -0.5 * slope * match / norm)
        spread = through_gram(
            alpha,
            gram_ptr + nth * BLOCK_R * BLOCK_R,
            length_ptr + nth * BLOCK_R,
            region,
            NORM_PRECISION,
            BLOCK_R,
        )
        dalpha = slope[:, None] * u + (2.0 * dsquare)[:, None] * spread
        tl.store(alpha_ptr + out, alpha.to(alpha_ptr.dtype.element_ty), mask=stored)
        weighted = dsquare[:, None] * alpha
        store_in_range(weighted_ptr + out, weighted, stored)
    else:
        slope = grad
        dalpha = slope[:, None] * u
    if HARD:
        da = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    else:
        dz = alpha * (dalpha - tl.sum(alpha * dalpha, 1)[:, None])
        tl.store(dscale_ptr + nth * height + (row - first_row), tl.sum(dz * x, 1), mask=inside)
        da = prenormalized_gradient(scale * dz, x, a, LEAKY, NORM, BLOCK_T)
    direct = slope[:, None] * alpha
    if SHARED:
        da += direct
    else:
        store_in_range(du_ptr + out, direct, stored)
    store_in_range(da_ptr + out, tl.where(kept, da, 0.0), stored)
