"""What the Triton kernels of word-region attention share: queries of a program, its tile of scores, and their normalisation.

Where the queries of a caption are normalised together, a program owns whole captions of BLOCK_T rows each, some of them empty.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_tiles import LOG2_E, finite_or_zero, logits_tile

NO_INDEX = tl.constexpr(2147483647)
EPSILON = tl.constexpr(1e-8)
SLOPE = tl.constexpr(0.1)
# Where a tile lies must not be compiled into the kernel: there would be one for every kind of place.
AREA = ["row_tiles", "image_start", "caption_start", "caption_end"]


@triton.jit
def queries_of_program(
    tile, caption_start, caption_end, words, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Rows of the flattened queries, int64 [BLOCK_M], and which of them there are."""
    i = tl.arange(0, BLOCK_M)
    if NORM == "none":
        row = tl.cast(caption_start, tl.int64) * words + tile.to(tl.int64) * BLOCK_M + i
        return row, row < tl.cast(caption_end, tl.int64) * words
    else:
        caption = caption_start + tile.to(tl.int64) * (BLOCK_M // BLOCK_T) + i // BLOCK_T
        word = i % BLOCK_T
        return caption * words + word, (caption < caption_end) & (word < words)


@triton.jit
def with_mask(inside, mask_ptr, at, MASKED: tl.constexpr):
    if MASKED:
        return inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    else:
        return inside


@triton.jit
def store_in_range(pointer, value, mask):
    """Stores a gradient; what is finite stays finite in float16, since it meets zeros in the products that follow."""
    if pointer.dtype.element_ty == tl.float16:
        value = tl.where((value > 65504.0) & (value < float("inf")), 65504.0, value)
        value = tl.where((value < -65504.0) & (value > float("-inf")), -65504.0, value)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def dot_tile(
    x_ptr, y_ptr, row, region, rows, regions, depth, kept, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x[row] @ y[region].T in float32, 0 where not `kept`, whatever padding holds."""
    tile = logits_tile(
        x_ptr, y_ptr, 1.0, row, region, rows, regions, regions, depth,
        False, EVEN_D, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    return tl.where(kept, tile, 0.0)


@triton.jit
def sum_over_words(x, BLOCK_T: tl.constexpr):
    """The sum over the words of each caption, beside each of them."""
    grouped = tl.reshape(x, [x.shape[0] // BLOCK_T, BLOCK_T, x.shape[1]])
    total = tl.expand_dims(tl.sum(grouped, 1), 1)
    return tl.reshape(tl.broadcast_to(total, grouped.shape), x.shape)


@triton.jit
def maximum_over_words(x, BLOCK_T: tl.constexpr):
    grouped = tl.reshape(x, [x.shape[0] // BLOCK_T, BLOCK_T, x.shape[1]])
    top = tl.expand_dims(tl.max(grouped, 1), 1)
    return tl.reshape(tl.broadcast_to(top, grouped.shape), x.shape)


@triton.jit
def prenormalized(a, kept, LEAKY: tl.constexpr, NORM: tl.constexpr, BLOCK_T: tl.constexpr):
    """pre(a), 0 where not `kept` as `a` is."""
    x = a
    if LEAKY:
        x = tl.where(a > 0, a, SLOPE * a)
    if NORM == "softmax":
        top = maximum_over_words(tl.where(kept, x, float("-inf")), BLOCK_T)
        e = tl.where(kept, tl.exp2((x - finite_or_zero(top)) * LOG2_E), 0.0)
        total = sum_over_words(e, BLOCK_T)
        x = e / tl.where(total == 0.0, 1.0, total)
    elif NORM == "l2norm":
        x /= tl.sqrt(sum_over_words(x * x, BLOCK_T)) + EPSILON
    elif NORM == "l1norm":
        x /= sum_over_words(tl.abs(x), BLOCK_T) + EPSILON
    return x


@triton.jit
def prenormalized_gradient(dx, x, a, LEAKY: tl.constexpr, NORM: tl.constexpr, BLOCK_T: tl.constexpr):
    """dL/da from dL/dx of x = prenormalized(a)."""
    if NORM == "softmax":
        dx = x * (dx - sum_over_words(x * dx, BLOCK_T))
    elif NORM != "none":
        before = tl.where(a > 0, a, SLOPE * a) if LEAKY else a
        along = sum_over_words(x * dx, BLOCK_T)
        if NORM == "l2norm":
            length = tl.sqrt(sum_over_words(before * before, BLOCK_T))
            dx = dx / (length + EPSILON) - x * (along / tl.where(length == 0.0, 1.0, length))
        else:
            sign = tl.where(before > 0, 1.0, tl.where(before < 0, -1.0, 0.0))
            dx = (dx - sign * along) / (sum_over_words(tl.abs(before), BLOCK_T) + EPSILON)
    if LEAKY:
        dx = tl.where(a > 0, dx, SLOPE * dx)
    return dx
