"""Similarities and what is read off them, as the papers write them: dense scores, sorted. Works in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..._positives import Positives

EPSILON = 1e-12


def order(x: Tensor, y: Tensor) -> Tensor:
    """S_mn = - sum_d max(0, y_nd - x_md)^2 in float32 or float64, from [..., M, D] and [..., N, D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    excess = F.relu(y.to(wide).unsqueeze(-3) - x.to(wide).unsqueeze(-2))
    return -excess.square().sum(-1)


def scores(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Scores [M, N] in float64. Each is a sum of its own, so that equal rows have equal scores, which no BLAS promises."""
    x, y = x.double(), y.double()
    rows = [order(row[None], y)[0] if metric == "order" else (row * y).sum(1) for row in x]
    found = torch.stack(rows) if rows else x.new_zeros(0, y.shape[0])
    if metric != "cosine":
        return found
    x_norm, y_norm = (t.square().sum(1).sqrt().clamp(min=EPSILON) for t in (x, y))
    return found / (x_norm[:, None] * y_norm)


def largest(scores: Tensor, k: int, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties by lowest index, NaN first; -inf and index -1 where fewer are left."""
    if excluded is not None:
        scores = scores.masked_fill(excluded, -math.inf)
    indices = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    if excluded is not None:
        indices = indices.masked_fill(excluded, -1)
        # Excluded entries go behind a candidate whose score is -inf itself.
        behind = excluded.long().sort(dim=1, stable=True).indices
        scores, indices = scores.gather(1, behind), indices.gather(1, behind)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices.gather(1, order)[:, :k]


def positive_mask(positives: Positives, rows: int, columns: int) -> Tensor:
    """Dense boolean [rows, columns] of the positive pairs."""
    if positives.x_ids is not None and positives.y_ids is not None:
        return positives.x_ids[:, None] == positives.y_ids[None, :]
    assert positives.rows is not None and positives.columns is not None
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=positives.rows.device)
    mask[positives.rows, positives.columns] = True
    return mask


def ranks(scores: Tensor, positive: Tensor) -> Tensor:
    """rank_i = #{j not a positive of i: s_ij >= max over positives p of s_ip}, where a NaN is never below anything."""
    if scores.shape[1] == 0:
        return torch.zeros(scores.shape[0], dtype=torch.int64, device=scores.device)
    best = scores.masked_fill(~positive, -math.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~positive).sum(1)
