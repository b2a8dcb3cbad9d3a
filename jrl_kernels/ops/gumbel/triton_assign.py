"""Triton kernels of gumbel_assign. A program owns a tile [BLOCK_G, BLOCK_S] of one image's logits, or of what they weigh.

Tiles of logits and noise are recomputed wherever they are needed; none is stored but the gradient's, for the products after it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_tiles import LOG2_E, finite_or_zero, logits_tile
from .triton_noise import gumbel_tile

STREAM = tl.constexpr(0)
NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def logits_with_noise(
    queries_ptr, keys_ptr, scale_ptr, seed_ptr, image, first_group, first_token, groups, tokens, depth,
    NOISE: tl.constexpr, QUADS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q . k and scale q . k + noise of a tile; the second is -inf for groups past the end."""
    group = first_group + tl.arange(0, BLOCK_G)
    token = first_token + tl.arange(0, BLOCK_S)
    dot = logits_tile(
        queries_ptr + image * groups * depth, keys_ptr + image * tokens * depth, 1.0, group, token,
        groups, tokens, tokens, depth, False, EVEN_D, PRECISION, BLOCK_G, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    z = dot * tl.load(scale_ptr)
    if NOISE:
        row = image * groups + group
        z += gumbel_tile(tl.load(seed_ptr), row, first_token, tokens, STREAM, QUADS, BLOCK_S)
    return dot, tl.where((group < groups)[:, None], z, float("-inf"))


@triton.jit
def soft_tile(z, log_sum_exp_ptr, mask_ptr, image, token, tokens, inverse_tau, MASK: tl.constexpr):
    """A = exp(z / tau - log-sum-exp); zero for tokens past the end and masked ones."""
    at = image * tokens + token
    counts = token < tokens
    log_sum_exp = tl.load(log_sum_exp_ptr + at, mask=counts, other=0.0)
    if MASK:
        counts = counts & (tl.load(mask_ptr + at, mask=counts, other=0) != 0)
    a = tl.exp2(z * (inverse_tau * LOG2_E) - (log_sum_exp * LOG2_E)[None, :])
    return tl.where(counts[None, :], a, 0.0)


@triton.jit
def gumbel_assign_statistics_kernel(
    queries_ptr, keys_ptr, scale_ptr, seed_ptr, mask_ptr, index_ptr, log_sum_exp_ptr,
    groups, tokens, depth, inverse_tau,
    NOISE: tl.constexpr, MASK: tl.constexpr, QUADS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each token's group and log-sum-exp over the groups of z / tau."""
    tiles = tl.cdiv(tokens, BLOCK_S)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_S
    token = first + tl.arange(0, BLOCK_S)
    rate = inverse_tau * LOG2_E
    top = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    index = tl.zeros([BLOCK_S], tl.int32)
    for first_group in range(0, groups, BLOCK_G):
        _, z = logits_with_noise(
            queries_ptr, keys_ptr, scale_ptr, seed_ptr, image, first_group, first, groups, tokens, depth,
            NOISE, QUADS, EVEN_D, PRECISION, BLOCK_G, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        group = first_group + tl.arange(0, BLOCK_G)
        highest = tl.max(z, 0)
        best = tl.min(tl.where(z == highest[None, :], group[:, None], NO_INDEX), 0)
        index = tl.where(highest > top, best, index)
        higher = tl.maximum(top, highest)
        reference = finite_or_zero(higher)
        total *= tl.exp2((top - reference) * rate)
        total += tl.sum(tl.exp2((z - reference[None, :]) * rate), 0)
        top = higher
    log_sum_exp = finite_or_zero(top) * inverse_tau + tl.log(total)
    at = image * tokens + token
    inside = token < tokens
    if MASK:
        counts = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        index = tl.where(counts, index, -1)
        log_sum_exp = tl.where(counts, log_sum_exp, 0.0)
    tl.store(index_ptr + at, index.to(tl.int64), mask=inside)
    tl.store(log_sum_exp_ptr + at, log_sum_exp, mask=inside)


@triton.jit
def gumbel_assign_pool_kernel(
    queries_ptr, keys_ptr, values_ptr, scale_ptr, seed_ptr, mask_ptr, index_ptr, log_sum_exp_ptr,
    pooled_ptr, means_ptr, share_ptr, groups, tokens, depth, width, inverse_tau, eps,
    HARD: tl.constexpr, NOISE: tl.constexpr, MASK: tl.constexpr, QUADS: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sums of the values of each group, its share of the tokens, and their quotient."""
    # One tile even of no width: the shares are wanted all the same.
    wide_tiles = tl.maximum(tl.cdiv(width, BLOCK_E), 1)
    group_tiles = tl.cdiv(groups, BLOCK_G)
    column_tile = tl.program_id(0) % wide_tiles
    rest = tl.program_id(0) // wide_tiles
    first_group = rest % group_tiles * BLOCK_G
    image = (rest // group_tiles).to(tl.int64)
    group = first_group + tl.arange(0, BLOCK_G)
    column = column_tile * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    share = tl.zeros([BLOCK_G], tl.float32)
    for first in range(0, tokens, BLOCK_S):
        token = first + tl.arange(0, BLOCK_S)
        at = image * tokens + token
        inside = token < tokens
        if HARD:
            index = tl.load(index_ptr + at, mask=inside, other=-1)
            log_sum_exp = tl.load(log_sum_exp_ptr + at, mask=inside, other=0.0)
            weight = (index[None, :] == group[:, None]).to(tl.float32)
            # Zero, but NaN where a token's softmax is: its one-hot row would hide what reached the logits.
            share += tl.sum(log_sum_exp - log_sum_exp, 0)
        else:
            _, z = logits_with_noise(
                queries_ptr, keys_ptr, scale_ptr, seed_ptr, image, first_group, first, groups, tokens, depth,
                NOISE, QUADS, EVEN_D, PRECISION, BLOCK_G, BLOCK_S, BLOCK_D,
            )  # fmt: skip
            weight = soft_tile(z, log_sum_exp_ptr, mask_ptr, image, token, tokens, inverse_tau, MASK)
        share += tl.sum(weight, 1)
        value = tl.load(
            values_ptr + at[:, None] * width + column[None, :],
            mask=inside[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total = weighted_sum(weight, value, total, PRECISION, WIDE)
    weight_sum = share + eps
    empty = weight_sum == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, weight_sum))
    mean = total * inverse[:, None]
    row = image * groups + group
    inside_group = group < groups
    out = row[:, None] * width + column[None, :]
    inside_out = inside_group[:, None] & (column < width)[None, :]
    tl.store(pooled_ptr + out, mean.to(pooled_ptr.dtype.element_ty), mask=inside_out)
    tl.store(means_ptr + out, mean, mask=inside_out)
    tl.store(share_ptr + row, share, mask=inside_group & (column_tile == 0))


@triton.jit
def weighted_sum(weight, value, total, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """total + weight @ value. WIDE: float16 values times weights that float16 would flush to zero; TF32 holds both."""
    if WIDE:
        return tl.dot(weight, value.to(tl.float32), total, input_precision="tf32")
    else:
        return tl.dot(weight.to(value.dtype), value, total, input_precision=PRECISION)


@triton.jit
def gumbel_assign_center_kernel(
    grad_ptr, means_ptr, share_ptr, inverse_ptr, center_ptr, rows, width, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """For each group 1 / (share + eps), or zero, and du . u."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, width, BLOCK_E):
        column = first + tl.arange(0, BLOCK_E)
        at = row[:, None] * width + column[None, :]
        mask = inside[:, None] & (column < width)[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sums += tl.sum(grad * tl.load(means_ptr + at, mask=mask, other=0.0), 1)
    weight_sum = tl.load(share_ptr + row, mask=inside, other=1.0) + eps
    empty = weight_sum == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, weight_sum))
    tl.store(inverse_ptr + row, inverse, mask=inside)
    tl.store(center_ptr + row, sums, mask=inside)


@triton.jit
def gradient_tile(
    queries_ptr, keys_ptr, values_ptr, grad_ptr, scale_ptr, seed_ptr, mask_ptr, log_sum_exp_ptr, inverse_ptr, center_ptr,
    image, first_group, first, groups, tokens, depth, width, inverse_tau,
    NOISE: tl.constexpr, MASK: tl.constexpr, QUADS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q . k, A and A dA = A / (share_g + eps) (du_g . v_s - du_g . u_g) of a tile."""
    group = first_group + tl.arange(0, BLOCK_G)
    token = first + tl.arange(0, BLOCK_S)
    ada = logits_tile(
        grad_ptr + image * groups * width, values_ptr + image * tokens * width, 1.0, group, token,
        groups, tokens, tokens, width, False, EVEN_E, PRECISION, BLOCK_G, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    row = image * groups + group
    inverse = tl.load(inverse_ptr + row, mask=group < groups, other=0.0)
    center = tl.load(center_ptr + row, mask=group < groups, other=0.0)
    dot, z = logits_with_noise(
        queries_ptr, keys_ptr, scale_ptr, seed_ptr, image, first_group, first, groups, tokens, depth,
        NOISE, QUADS, EVEN_D, PRECISION, BLOCK_G, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    a = soft_tile(z, log_sum_exp_ptr, mask_ptr, image, token, tokens, inverse_tau, MASK)
    # A inverse before the rest: it is at most 1, where the inverse of a group of hardly any weight may be huge.
    return dot, a, a * inverse[:, None] * (ada - center[:, None])


@triton.jit
def gumbel_assign_gradient_kernel(
    queries_ptr, keys_ptr, values_ptr, grad_ptr, scale_ptr, seed_ptr, mask_ptr, log_sum_exp_ptr, inverse_ptr, center_ptr,
    out_ptr, dscale_ptr, first_image, groups, tokens, depth, width, out_stride, inverse_tau,
    NOISE: tl.constexpr, MASK: tl.constexpr, QUADS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
    ONE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale dL/dl = scale A (dA - sum_g A dA) / tau into out [image - first_image, G, out_stride]; partials of dscale.

    ONE says that a tile holds all groups; else they are visited twice, first for the sum.
    """
    tiles = tl.cdiv(tokens, BLOCK_S)
    place = (tl.program_id(0) // tiles).to(tl.int64)
    image = first_image + place
    first = tl.program_id(0) % tiles * BLOCK_S
    token = first + tl.arange(0, BLOCK_S)
    mean = tl.zeros([BLOCK_S], tl.float32)
    if not ONE:
        for first_group in range(0, groups, BLOCK_G):
            _, _, ada = gradient_tile(
                queries_ptr, keys_ptr, values_ptr, grad_ptr, scale_ptr, seed_ptr, mask_ptr, log_sum_exp_ptr,
                inverse_ptr, center_ptr, image, first_group, first, groups, tokens, depth, width, inverse_tau,
                NOISE, MASK, QUADS, EVEN_D, EVEN_E, PRECISION, BLOCK_G, BLOCK_S, BLOCK_D,
            )  # fmt: skip
            mean += tl.sum(ada, 0)
    dscale = tl.zeros([BLOCK_S], tl.float32)
    for first_group in range(0, groups, BLOCK_G):
        dot, a, ada = gradient_tile(
            queries_ptr, keys_ptr, values_ptr, grad_ptr, scale_ptr, seed_ptr, mask_ptr, log_sum_exp_ptr,
            inverse_ptr, center_ptr, image, first_group, first, groups, tokens, depth, width, inverse_tau,
            NOISE, MASK, QUADS, EVEN_D, EVEN_E, PRECISION, BLOCK_G, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        if ONE:
            mean = tl.sum(ada, 0)
        dl = (ada - a * mean[None, :]) * inverse_tau
        dscale += tl.sum(dl * dot, 0)
        group = first_group + tl.arange(0, BLOCK_G)
        at = (place * groups + group)[:, None] * out_stride + token[None, :]
        inside = (group < groups)[:, None] & (token < tokens)[None, :]
        tl.store(out_ptr + at, (dl * tl.load(scale_ptr)).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(
        dscale_ptr + image * tiles + tl.program_id(0) % tiles,
        tl.sum(tl.where(token < tokens, dscale, 0.0), 0),
    )


@triton.jit
def gumbel_assign_spread_kernel(
    queries_ptr, keys_ptr, grad_ptr, scale_ptr, seed_ptr, mask_ptr, index_ptr, log_sum_exp_ptr, inverse_ptr, out_ptr,
    groups, tokens, depth, width, inverse_tau,
    HARD: tl.constexpr, NOISE: tl.constexpr, MASK: tl.constexpr, QUADS: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dv_s = sum_g Â_gs du_g / (share_g + eps)."""
    wide_tiles = tl.cdiv(width, BLOCK_E)
    tiles = tl.cdiv(tokens, BLOCK_S)
    column = tl.program_id(0) % wide_tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    rest = tl.program_id(0) // wide_tiles
    first = rest % tiles * BLOCK_S
    image = (rest // tiles).to(tl.int64)
    token = first + tl.arange(0, BLOCK_S)
    at = image * tokens + token
    inside = token < tokens
    if HARD:
        index = tl.load(index_ptr + at, mask=inside, other=-1)
        chosen = index >= 0
        row = image * groups + index
        total = tl.load(
            grad_ptr + row[:, None] * width + column[None, :],
            mask=chosen[:, None] & (column < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        total *= tl.load(inverse_ptr + row, mask=chosen, other=0.0)[:, None]
    else:
        total = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
        for first_group in range(0, groups, BLOCK_G):
            _, z = logits_with_noise(
                queries_ptr, keys_ptr, scale_ptr, seed_ptr, image, first_group, first, groups, tokens, depth,
                NOISE, QUADS, EVEN_D, PRECISION, BLOCK_G, BLOCK_S, BLOCK_D,
            )  # fmt: skip
            a = soft_tile(z, log_sum_exp_ptr, mask_ptr, image, token, tokens, inverse_tau, MASK)
            group = first_group + tl.arange(0, BLOCK_G)
            row = image * groups + group
            inverse = tl.load(inverse_ptr + row, mask=group < groups, other=0.0)
            grad = tl.load(
                grad_ptr + row[:, None] * width + column[None, :],
                mask=(group < groups)[:, None] & (column < width)[None, :],
                other=0.0,
            )
            total = weighted_sum(tl.trans(a * inverse[:, None]), grad, total, PRECISION, WIDE)
    tl.store(
        out_ptr + at[:, None] * width + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < width)[None, :],
    )
