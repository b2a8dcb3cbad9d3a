"""Late interaction as its papers write it: all similarities at once. Works in float64, twice differentiable."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def padded(rows: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed sequences [N, D] as [groups, longest, D], and which of its items exist."""
    place = torch.arange(longest, device=rows.device)
    exists = place < offsets.diff()[:, None]
    if rows.shape[0] == 0:
        return rows.new_zeros(*exists.shape, rows.shape[1]) + rows.sum(), exists
    index = torch.where(exists, offsets[:-1, None] + place, 0)
    return rows[index], exists


def maxima(s: Tensor, searched: Tensor, reduced: Tensor, mask_mode: str, reduce: str) -> Tensor:
    """Sum or mean over axis -2, where `reduced`, of the maximum over axis -1, where `searched`."""
    if s.shape[-1] == 0:
        top = s.sum(-1)
    else:
        top = torch.where(searched, s, -math.inf if mask_mode == "exclude" else 0.0).max(-1).values
    counts = reduced if mask_mode == "zero" else reduced & searched.any(-1)
    total = torch.where(counts, top, 0.0).sum(-1)
    return total / reduced.sum(-1).clamp(min=1) if reduce == "mean" else total


def max_sim(
    regions: Tensor,
    words: Tensor,
    region_mask: Tensor | None,
    word_mask: Tensor | None,
    reduce: str,
    direction: str,
    mask_mode: str,
) -> Tensor:
    """Scores [B, C] from regions [B, R, D] and words [C, T, D]."""
    wide = torch.promote_types(regions.dtype, torch.float32)
    regions, words = regions.to(wide), words.to(wide)
    if region_mask is None:
        region_mask = torch.ones(regions.shape[:2], dtype=torch.bool, device=regions.device)
    if word_mask is None:
        word_mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
    # Padding may hold anything: a product with NaN would reach the gradient through 0 * NaN.
    regions = torch.where(region_mask[..., None], regions, 0.0)
    words = torch.where(word_mask[..., None], words, 0.0)
    with torch.autocast(regions.device.type, enabled=False):
        s = torch.einsum("brd,ctd->bctr", regions, words)
    of_regions, of_words = region_mask[:, None, None, :], word_mask[None, :, None, :]
    scores = []
    if direction != "regions":
        scores.append(maxima(s, of_regions, word_mask[None], mask_mode, reduce))
    if direction != "words":
        scores.append(maxima(s.transpose(2, 3), of_words, region_mask[:, None], mask_mode, reduce))
    return scores[0] if len(scores) == 1 else (scores[0] + scores[1]) / 2


def max_sim_varlen(
    regions: Tensor,
    words: Tensor,
    region_offsets: Tensor,
    word_offsets: Tensor,
    longest_regions: int,
    longest_words: int,
    reduce: str,
    direction: str,
) -> Tensor:
    """Scores [B, C] from packed sequences, which are padded."""
    padded_regions, region_mask = padded(regions, region_offsets, longest_regions)
    padded_words, word_mask = padded(words, word_offsets, longest_words)
    return max_sim(padded_regions, padded_words, region_mask, word_mask, reduce, direction, "exclude")
