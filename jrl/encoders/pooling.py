"""From token features to one vector."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_pool(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the real tokens: Σ_l m_l x_l / Σ_l m_l; zeros where a row has none.

    Args:
        tokens: [B, L, W] float.
        mask: [B, L] bool or None.

    Returns:
        [B, W] in the dtype of `tokens`.
    """
    if mask is None:
        return tokens.mean(dim=1)
    # where, not a product: a NaN in a padded position must not leak into the mean
    kept = tokens.masked_fill(~mask[..., None], 0.0)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1).to(tokens.dtype)
    return kept.sum(dim=1) / count


def last_pool(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The last real token of each row.

    Args:
        tokens: [B, L, W] float.
        mask: [B, L] bool or None.

    Returns:
        [B, W]; the first token where a row has no real one.
    """
    if mask is None:
        return tokens[:, -1]
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    last = torch.where(mask, positions, torch.zeros_like(positions)).amax(dim=1)
    return tokens[torch.arange(tokens.shape[0], device=tokens.device), last]


def eos_pool(tokens: Tensor, input_ids: Tensor, eos_token_id: int) -> Tensor:
    """The token at the first end-of-sequence id of each row.

    Args:
        tokens: [B, L, W] float.
        input_ids: [B, L] int64.
        eos_token_id: the id to look for.

    Returns:
        [B, W]. A row without the id raises on a CPU; on an accelerator, where looking would stall
        the device, its vector is NaN.

    Raises:
        ValueError: `input_ids` on a CPU has a row without `eos_token_id`.
    """
    hits = input_ids == eos_token_id
    found = hits.any(dim=1)
    pooled = tokens[torch.arange(tokens.shape[0], device=tokens.device), hits.int().argmax(dim=1)]
    if input_ids.device.type == "cpu":
        if not bool(found.all()):
            row = int((~found).nonzero()[0])
            raise ValueError(
                f"input_ids: pooling 'eos' expected the id {eos_token_id} in every row, row {row} has none; "
                "let the tokenizer add it, or pool with 'last'"
            )
        return pooled
    return pooled.masked_fill(~found[:, None], float("nan"))
