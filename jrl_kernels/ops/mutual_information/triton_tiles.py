"""Triton kernels of the bounds of the mutual information: sums over the pairs of different images, and the gradient.

A row and a column of the same image are an own pair; an image of -1 marks one that does not count.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_math import log_sum_exp, sigmoid, softplus
from ..._triton_tiles import LOG2_E, logits_tile, tile_of_program


@triton.jit
def images_of_tile(x_images_ptr, y_images_ptr, row, column, row_end, column_end):
    x_image = tl.load(x_images_ptr + row, mask=row < row_end, other=-1)[:, None]
    y_image = tl.load(y_images_ptr + column, mask=column < column_end, other=-1)[None, :]
    return x_image, y_image, (x_image >= 0) & (y_image >= 0)


@triton.jit
def mutual_information_sums_kernel(
    x_ptr, y_ptr, scale_ptr, x_images_ptr, y_images_ptr, row_partials_ptr, column_partials_ptr,
    rows, columns, column_start, column_end, depth,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FROM_SCORES: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Over different images: partials of rows [column tile, row] and of columns [row tile, column - column_start].

    Log-sum-exps or, with SOFTPLUS (rows alone), sums of softplus(u).
    """
    column_tiles = tl.cdiv(column_end - column_start, BLOCK_N)
    row_tile, column_tile = tile_of_program(tl.cdiv(rows, BLOCK_M), column_tiles, GROUP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_start + column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    u = logits_tile(
        x_ptr, y_ptr, tl.load(scale_ptr), row, column, rows, column_end, columns, depth,
        FROM_SCORES, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    x_image, y_image, counts = images_of_tile(x_images_ptr, y_images_ptr, row, column, rows, column_end)
    # A tile's own columns, those past the end and those that do not count add exp(-inf) or softplus(-inf), which is 0.
    u = tl.where(counts & (x_image != y_image), u, float("-inf"))
    if ROWS:
        row_at = column_tile.to(tl.int64) * rows + row
        total = tl.sum(softplus(u), 1) if SOFTPLUS else log_sum_exp(u, 1)
        tl.store(row_partials_ptr + row_at, total, mask=row < rows)
    if COLUMNS:
        column_at = row_tile.to(tl.int64) * (column_end - column_start) + (column - column_start)
        tl.store(column_partials_ptr + column_at, log_sum_exp(u, 0), mask=column < column_end)


@triton.jit
def mutual_information_gradient_kernel(
    x_ptr, y_ptr, scale_ptr, x_images_ptr, y_images_ptr, own_ptr, off_ptr,
    log_sum_x_ptr, weight_x_ptr, log_sum_y_ptr, weight_y_ptr, unit_ptr, out_ptr,
    row_start, row_end, column_start, column_end, columns, out_stride, depth,
    BOUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr, FROM_SCORES: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """d bound / du of one tile, over the unit where there is one."""
    row_tiles = tl.cdiv(row_end - row_start, BLOCK_M)
    row_tile, column_tile = tile_of_program(row_tiles, tl.cdiv(column_end - column_start, BLOCK_N), GROUP)
    row = row_start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_start + column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    u = logits_tile(
        x_ptr, y_ptr, tl.load(scale_ptr), row, column, row_end, column_end, columns, depth,
        FROM_SCORES, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    x_image, y_image, counts = images_of_tile(x_images_ptr, y_images_ptr, row, column, row_end, column_end)
    own = x_image == y_image
    own_slope = tl.load(own_ptr)
    if BOUND == "jsd":
        g = tl.where(own, own_slope, tl.load(off_ptr)) * sigmoid(tl.where(own, -u, u))
    else:
        # One exp serves both kinds of pairs: sigmoid(log_sum - u) = 1 / (1 + exp(u - log_sum)).
        off_slope = tl.zeros_like(u)
        share = tl.zeros_like(u)
        if ROWS:
            log_sum = tl.load(log_sum_x_ptr + row, mask=row < row_end, other=0.0)[:, None]
            ratio = tl.exp2((u - log_sum) * LOG2_E)
            off_slope = tl.load(weight_x_ptr + row, mask=row < row_end, other=0.0)[:, None] * ratio
            share = 1.0 / (1.0 + ratio)
        if COLUMNS:
            log_sum = tl.load(log_sum_y_ptr + column, mask=column < column_end, other=0.0)[None, :]
            ratio = tl.exp2((u - log_sum) * LOG2_E)
            off_slope += tl.load(weight_y_ptr + column, mask=column < column_end, other=0.0)[None, :] * ratio
            share += 1.0 / (1.0 + ratio)
        g = tl.where(own, own_slope if BOUND == "dv" else own_slope * share, off_slope)
    g = tl.where(counts, g, 0.0)
    if UNIT:
        g /= tl.load(unit_ptr)
    offset = (row - row_start).to(tl.int64)[:, None] * out_stride + (column - column_start)[None, :]
    inside = (row < row_end)[:, None] & (column < column_end)[None, :]
    tl.store(out_ptr + offset, g.to(out_ptr.dtype.element_ty), mask=inside)
