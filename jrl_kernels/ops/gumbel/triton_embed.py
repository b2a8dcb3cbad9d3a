"""Triton kernels of gumbel_embed. Noise and probabilities are recomputed tile by tile; none is stored."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_tiles import LOG2_E, finite_or_zero, logits_tile
from .triton_assign import weighted_sum
from .triton_noise import gumbel_tile

STREAM = tl.constexpr(1)
NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def gumbel_embed_statistics_kernel(
    logits_ptr, seed_ptr, values_ptr, index_ptr, log_sum_exp_ptr, codes, chunks, slots, inverse_tau,
    NOISE: tl.constexpr, QUADS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of one row and one chunk of its codes: log-sum-exp of z / tau, and the `slots` largest z, in order, with their codes."""
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = chunk * BLOCK_V
    code = first + tl.arange(0, BLOCK_V)
    inside = code < codes
    z = tl.load(logits_ptr + row * codes + code, mask=inside, other=float("-inf")).to(tl.float32)
    if NOISE:
        rows = row + tl.zeros([1], tl.int64)
        z += gumbel_tile(tl.load(seed_ptr), rows, first, codes, STREAM, QUADS, BLOCK_V).reshape(BLOCK_V)
    reference = finite_or_zero(tl.max(z, 0))
    total = tl.sum(tl.exp2((z - reference) * (inverse_tau * LOG2_E)), 0)
    part = row * chunks + chunk
    tl.store(log_sum_exp_ptr + part, reference * inverse_tau + tl.log(total))
    # Whether a code is left cannot be told from its value: -inf is a logit like any other.
    left = inside
    for slot in range(slots):
        value = tl.max(tl.where(left, z, float("-inf")), 0)
        best = tl.min(tl.where(left & (z == value), code, NO_INDEX), 0)
        # Where none is left, or one is NaN: any code will do.
        best = tl.minimum(best, codes - 1)
        tl.store(values_ptr + part * slots + slot, value)
        tl.store(index_ptr + part * slots + slot, best.to(tl.int64))
        left = left & (code != best)


@triton.jit
def probabilities(
    logits_ptr, seed_ptr, log_sum_exp_ptr, row, first_code, rows, codes, inverse_tau,
    NOISE: tl.constexpr, QUADS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """p [row, BLOCK_V], zero past the ends; `row` is int64."""
    code = first_code + tl.arange(0, BLOCK_V)
    inside = (row < rows)[:, None] & (code < codes)[None, :]
    z = tl.load(logits_ptr + row[:, None] * codes + code[None, :], mask=inside, other=0.0).to(tl.float32)
    if NOISE:
        z += gumbel_tile(tl.load(seed_ptr), row, first_code, codes, STREAM, QUADS, BLOCK_V)
    log_sum_exp = tl.load(log_sum_exp_ptr + row, mask=row < rows, other=0.0)
    return tl.where(inside, tl.exp2(z * (inverse_tau * LOG2_E) - (log_sum_exp * LOG2_E)[:, None]), 0.0)


@triton.jit
def gumbel_embed_mixture_kernel(
    logits_ptr, seed_ptr, log_sum_exp_ptr, codebook_ptr, out_ptr, rows, codes, width, inverse_tau,
    NOISE: tl.constexpr, QUADS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """p @ codebook."""
    tiles = tl.cdiv(width, BLOCK_D)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_code in range(0, codes, BLOCK_V):
        p = probabilities(
            logits_ptr, seed_ptr, log_sum_exp_ptr, row, first_code, rows, codes, inverse_tau, NOISE, QUADS, BLOCK_V
        )  # fmt: skip
        code = (first_code + tl.arange(0, BLOCK_V)).to(tl.int64)
        entry = tl.load(
            codebook_ptr + code[:, None] * width + column[None, :],
            mask=(code < codes)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total = weighted_sum(p, entry, total, PRECISION, WIDE)
    tl.store(
        out_ptr + row[:, None] * width + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < width)[None, :],
    )


@triton.jit
def gumbel_embed_gradient_kernel(
    logits_ptr, seed_ptr, log_sum_exp_ptr, grad_ptr, codebook_ptr, mean_ptr, out_ptr,
    rows, codes, width, inverse_tau,
    SUMS: tl.constexpr, NOISE: tl.constexpr, QUADS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With SUMS each tile's part of sum_v p dp into mean [code tile, row]; else dL/dlogits = p (dp - mean) / tau."""
    tiles = tl.cdiv(codes, BLOCK_V)
    tile = tl.program_id(0) % tiles
    first_row = tl.program_id(0) // tiles * BLOCK_M
    row = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
    code = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    dp = logits_tile(
        grad_ptr, codebook_ptr, 1.0, row, code, rows, codes, codes, width,
        False, EVEN_D, PRECISION, BLOCK_M, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    p = probabilities(
        logits_ptr, seed_ptr, log_sum_exp_ptr, row, tile * BLOCK_V, rows, codes, inverse_tau, NOISE, QUADS, BLOCK_V
    )  # fmt: skip
    if SUMS:
        tl.store(mean_ptr + tile.to(tl.int64) * rows + row, tl.sum(p * dp, 1), mask=row < rows)
    else:
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        tl.store(
            out_ptr + row[:, None] * codes + code[None, :],
            (p * (dp - mean[:, None]) * inverse_tau).to(out_ptr.dtype.element_ty),
            mask=(row < rows)[:, None] & (code < codes)[None, :],
        )


@triton.jit
def gumbel_embed_codebook_kernel(
    logits_ptr, seed_ptr, log_sum_exp_ptr, grad_ptr, out_ptr, rows, codes, width, inverse_tau,
    NOISE: tl.constexpr, QUADS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """p.T @ de, the codebook's gradient of the mixture."""
    tiles = tl.cdiv(width, BLOCK_D)
    first_code = tl.program_id(0) // tiles * BLOCK_V
    code = (first_code + tl.arange(0, BLOCK_V)).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for first_row in range(0, rows, BLOCK_M):
        row = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
        p = probabilities(
            logits_ptr, seed_ptr, log_sum_exp_ptr, row, first_code, rows, codes, inverse_tau, NOISE, QUADS, BLOCK_V
        )  # fmt: skip
        grad = tl.load(
            grad_ptr + row[:, None] * width + column[None, :],
            mask=(row < rows)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total = weighted_sum(tl.trans(p), grad, total, PRECISION, WIDE)
    tl.store(
        out_ptr + code[:, None] * width + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(code < codes)[:, None] & (column < width)[None, :],
    )


@triton.jit
def gumbel_embed_segments_kernel(
    grad_ptr, order_ptr, offsets_ptr, out_ptr, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[v] = the sum of grad[order[i]] over i in [offsets[v], offsets[v + 1]), in order."""
    tiles = tl.cdiv(width, BLOCK_D)
    code = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(offsets_ptr + code), tl.load(offsets_ptr + code + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_R):
        entry = first + tl.arange(0, BLOCK_R)
        row = tl.load(order_ptr + entry, mask=entry < end, other=0)
        grad = tl.load(
            grad_ptr + row[:, None] * width + column[None, :],
            mask=(entry < end)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total += tl.sum(grad.to(tl.float32), 0)
    tl.store(out_ptr + code * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)
