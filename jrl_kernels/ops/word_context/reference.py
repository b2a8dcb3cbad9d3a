"""word_context as XMC-GAN writes it: cosines, a softmax over the words, a mean of the words. Twice differentiable."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(vectors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Vectors divided by their norm, in float32 or float64; masked ones, which may hold anything, are 0."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    if mask is not None:
        vectors = torch.where(mask[..., None], vectors, 0.0)
    return F.normalize(vectors, dim=-1)


def word_context(
    regions: Tensor, words: Tensor, word_mask: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Contexts [B, R, D] and attention [B, R, T], in float32 or float64."""
    with torch.autocast(regions.device.type, enabled=False):
        region_units, word_units = unit(regions), unit(words, word_mask)
        logits = scale * (region_units @ word_units.mT)
        if words.shape[1] == 0:
            attention = logits
        elif word_mask is None:
            attention = logits.softmax(-1)
        else:
            some = word_mask.any(-1)[:, None, None]
            # A caption without words is replaced before the softmax, so that neither its value nor its gradient is NaN.
            allowed = word_mask[:, None] | ~some
            attention = torch.where(some, logits.masked_fill(~allowed, -math.inf).softmax(-1), 0.0)
        return attention @ word_units, attention
