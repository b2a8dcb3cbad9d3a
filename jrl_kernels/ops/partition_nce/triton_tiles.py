"""The Triton kernel of noise-contrastive estimation: gathers rows of the bank, each once, for its score and its gradient."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_math import sigmoid, softplus


@triton.jit
def partition_nce_kernel(
    query_ptr, bank_ptr, positive_index_ptr, positive_mask_ptr, negative_index_ptr, positive_weight_ptr,
    scale_ptr, constant_ptr, losses_ptr, direction_ptr, depth, bank_stride, positives, negatives, span,
    MASKED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query and a span of its positives and negatives: a partial loss and the partial sum of slope times row.

    A positive's weight is one over the number of the query's positives; 0 marks a query without any, which contributes nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + row * depth + d, mask=d < depth, other=0.0).to(tl.float32)
    positive_weight = tl.load(positive_weight_ptr + row)
    scale, constant = tl.load(scale_ptr), tl.load(constant_ptr)
    losses = tl.zeros([BLOCK], tl.float32)
    direction = tl.zeros([BLOCK_D], tl.float32)
    end = tl.minimum((part + 1) * span, positives + negatives)
    end = tl.where(positive_weight > 0.0, end, 0)
    for start in range(part * span, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = at < end
        is_positive = at < positives
        positive = tl.load(positive_index_ptr + row * positives + at, mask=counts & is_positive, other=0)
        is_negative = counts & (at >= positives)
        negative = tl.load(negative_index_ptr + row * negatives + (at - positives), mask=is_negative, other=0)
        if MASKED:
            mask = tl.load(positive_mask_ptr + row * positives + at, mask=counts & is_positive, other=1)
            counts = counts & (mask != 0)
        place = bank_ptr + tl.where(is_positive, positive, negative)[:, None] * bank_stride + d[None, :]
        key = tl.load(place, mask=counts[:, None] & (d < depth)[None, :], other=0.0).to(tl.float32)
        u = scale * tl.sum(key * query[None, :], 1) - constant
        u = tl.where(is_positive, -u, u)
        weight = tl.where(is_positive, positive_weight, 1.0)
        losses += tl.where(counts, weight * softplus(u), 0.0)
        if GRADIENT:
            slope = tl.where(counts, tl.where(is_positive, -weight, weight) * sigmoid(u), 0.0)
            direction += tl.sum(slope[:, None] * key, 0)
    partial = row * tl.num_programs(1) + part
    tl.store(losses_ptr + partial, tl.sum(losses, 0))
    if GRADIENT:
        tl.store(direction_ptr + partial * depth + d, direction, mask=d < depth)
