"""A caption's score from its words' matches (or an image's, where regions attend): ordinary differentiable PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pooled(match: Tensor, mask: Tensor | None, how: str, pool_scale: Tensor) -> Tensor:
    """`match` [B, C, Q], 0 where `mask` (broadcast to it) is false, pooled over Q to [B, C]; 0 where the mask leaves nothing.

    sum; mean; max; "logsumexp" (1 / g) log sum_q exp(g match_q), g = pool_scale; "logsumexp_undivided" the same without 1 / g.
    """
    if how == "sum":
        return match.sum(-1)
    if how == "mean":
        count = match.shape[-1] if mask is None else mask.sum(-1).clamp(min=1)
        return match.sum(-1) / count
    logits = match if how == "max" else pool_scale * match
    some = None
    if mask is not None:
        # Nothing but -inf to pool would give NaN in the gradient.
        some = mask.any(-1)
        logits = torch.where(some.unsqueeze(-1), logits.masked_fill(~mask, -math.inf), 0.0)
    result = logits.amax(-1) if how == "max" else torch.logsumexp(logits, -1)
    if how == "logsumexp":
        result = result / pool_scale
    return result if some is None else torch.where(some, result, 0.0)
