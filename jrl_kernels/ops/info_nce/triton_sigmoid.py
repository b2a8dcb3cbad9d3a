"""Triton kernels of the sigmoid contrastive loss."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_math import softplus
from ..._triton_tiles import LOG2_E, equal_ids, logits_tile, reduce_sum, tile_of_program


@triton.jit
def sigmoid_contrastive_sums_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, x_ids_ptr, y_ids_ptr, row_partials_ptr,
    rows, columns, column_start, column_end, depth,
    FROM_SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIVES: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """sum_j softplus(s_ij), or softplus(-s_ij) for a positive by id, of each row and column tile."""
    column_tiles = tl.cdiv(column_end - column_start, BLOCK_N)
    row_tile, column_tile = tile_of_program(tl.cdiv(rows, BLOCK_M), column_tiles, GROUP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_start + column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    s = logits_tile(
        x_ptr, y_ptr, tl.load(scale_ptr), row, column, rows, column_end, columns, depth,
        FROM_SCORES, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if BIAS:
        s += tl.load(bias_ptr)
    if POSITIVES:
        s = tl.where(equal_ids(x_ids_ptr, y_ids_ptr, row, column, rows, column_end), -s, s)
    s = tl.where((column < column_end)[None, :], s, float("-inf"))
    total = tl.sum(softplus(s), 1)
    tl.store(row_partials_ptr + column_tile.to(tl.int64) * rows + row, total, mask=row < rows)


@triton.jit
def sigmoid_contrastive_reduce_kernel(
    partials_ptr,
    results_ptr,
    slots,
    length,
    CARRIED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    reduce_sum(partials_ptr, results_ptr, slots, length, at, at < length, CARRIED, BLOCK_SLOTS)


@triton.jit
def sigmoid_contrastive_gradient_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, x_ids_ptr, y_ids_ptr, upstream_ptr, unit_ptr, out_ptr,
    row_start, row_end, column_start, column_end, columns, out_stride, depth,
    FROM_SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIVES: tl.constexpr, UNIT: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """G_ij = upstream_i sigmoid(s_ij), or -upstream_i sigmoid(-s_ij) for a positive by id."""
    row_tiles = tl.cdiv(row_end - row_start, BLOCK_M)
    row_tile, column_tile = tile_of_program(row_tiles, tl.cdiv(column_end - column_start, BLOCK_N), GROUP)
    row = row_start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_start + column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    s = logits_tile(
        x_ptr, y_ptr, tl.load(scale_ptr), row, column, row_end, column_end, columns, depth,
        FROM_SCORES, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if BIAS:
        s += tl.load(bias_ptr)
    upstream = tl.load(upstream_ptr + row, mask=row < row_end, other=0.0)[:, None]
    if POSITIVES:
        positive = equal_ids(x_ids_ptr, y_ids_ptr, row, column, row_end, column_end)
        s = tl.where(positive, -s, s)
        upstream = tl.where(positive, -upstream, upstream)
    g = upstream / (1.0 + tl.exp2(-s * LOG2_E))
    if UNIT:
        g /= tl.load(unit_ptr)
    offset = (row - row_start).to(tl.int64)[:, None] * out_stride + (column - column_start)[None, :]
    tl.store(
        out_ptr + offset,
        g.to(out_ptr.dtype.element_ty),
        mask=(row < row_end)[:, None] & (column < column_end)[None, :],
    )
