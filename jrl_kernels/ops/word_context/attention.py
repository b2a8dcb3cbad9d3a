"""word_context by PyTorch's own fused attention, on CPUs and GPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import unit

# On a CPU storing the weights is faster than PyTorch's fused attention, and small beside what else is stored, while a caption
# has at most a share of D words.
_FEW_WORDS = 1 / 4


def word_context(regions: Tensor, words: Tensor, word_mask: Tensor | None, scale: Tensor) -> Tensor:
    """Contexts [B, R, D], in float32 or float64.

    In float32 for half inputs too: at a scale of 15 rounding the queries to bfloat16 would move an attention weight by 3%.
    """
    if regions.device.type == "cpu" and words.shape[1] <= _FEW_WORDS * words.shape[2]:
        return reference.word_context(regions, words, word_mask, scale)[0]
    with torch.autocast(regions.device.type, enabled=False):
        queries, keys = unit(regions) * scale, unit(words, word_mask)
        if words.shape[1] == 0:
            return queries @ keys.mT @ keys
        # PyTorch's kernel for CPUs gives 0 for a query that is NaN; this is 0 unless there is a NaN.
        strange = 0.0 * (queries.sum(-1, keepdim=True) + keys.sum((1, 2))[:, None, None]).detach()
        allowed = None
        if word_mask is not None:
            # The words of a caption without any are zero vectors: attending to all of them gives 0, where a softmax over none
            # would give NaN.
            some = word_mask.any(-1)[:, None, None]
            allowed = (word_mask[:, None] | ~some)[:, None].expand(-1, -1, regions.shape[1], -1)
            strange = torch.where(some, strange, 0.0)
        context = F.scaled_dot_product_attention(
            queries[:, None], keys[:, None], keys[:, None], attn_mask=allowed, scale=1.0
        )
        context = context[:, 0] + strange
        # Of a caption without words, not even a region that is NaN has a context.
        return context if word_mask is None else torch.where(some, context, 0.0)
