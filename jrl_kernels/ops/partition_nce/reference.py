"""The loss as its paper writes it: gathered scores, one softplus each. Works in float64, twice differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(query: Tensor, bank: Tensor, index: Tensor, scale: Tensor, counts: Tensor | None = None) -> Tensor:
    """scale * query_b . bank[index_bj], [B, J], in float32 or float64; 0 where it does not count."""
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        gathered = bank[index].to(wide)  # [B, J, D]
        if counts is not None:
            gathered = torch.where(counts[..., None], gathered, 0.0)
        return scale * (gathered @ query.to(wide)[..., None])[..., 0]


def softplus(s: Tensor) -> Tensor:
    """log(1 + exp(s)); PyTorch's own turns into s from 20 on, which float64 can tell from the truth."""
    return -F.logsigmoid(-s)


def partition_nce(
    query: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    positive_mask: Tensor | None,
    scale: Tensor,
    log_constant: Tensor,
) -> Tensor:
    """Row losses [B]; log_constant is log Q + log of the partition. A row without a positive is 0."""
    if positive_mask is None:
        positive_mask = torch.ones_like(positive_index, dtype=torch.bool)
    count = positive_mask.sum(1)
    some = (count > 0)[:, None].expand_as(negative_index)
    # What does not count is replaced before the softplus, so that neither its value nor its gradient is NaN.
    positive = log_constant - scores(query, bank, positive_index, scale, positive_mask)
    positive = torch.where(positive_mask, positive, -torch.inf)
    negative = scores(query, bank, negative_index, scale, some) - log_constant
    negative = torch.where(some, negative, -torch.inf)
    return softplus(positive).sum(1) / count.clamp(min=1) + softplus(negative).sum(1)
