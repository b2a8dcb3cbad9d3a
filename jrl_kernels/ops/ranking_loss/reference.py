"""The ranking loss as its papers write it: dense scores, one hinge a pair. Works in float64, twice differentiable."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """x @ y.T ("dot"), or -sum_d max(0, y_d - x_d)^2 ("order"), in float32 or float64."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(wide), y.to(wide)
        if metric == "dot":
            return x @ y.T
        return -F.relu(y[None, :, :] - x[:, None, :]).square().sum(2)


def row_losses(scores: Tensor, positive: Tensor, candidate: Tensor, margin: float, hardest: bool) -> Tensor:
    """sum_j max(0, margin - positive_i + s_ij) over the candidates j, or the largest of its terms."""
    if scores.shape[1] == 0:
        return scores.sum(1)
    if not hardest:
        return torch.where(candidate, F.relu(margin - positive[:, None] + scores), 0.0).sum(1)
    kept = torch.where(candidate, scores, -math.inf)
    worst = kept.argmax(1, keepdim=True)  # the lowest index among ties
    exists = (kept != -math.inf).any(1)
    violation = F.relu(margin - positive + scores.gather(1, worst)[:, 0])
    return torch.where(exists, violation, 0.0)


def ranking_loss(
    scores: Tensor,
    negative_scores: Tensor | None,
    exclude: tuple[Tensor, ...] | None,
    margin: float,
    hardest: bool,
    direction: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Losses of the rows and of the columns, from scores [M, N] and the extra keys' scores [M, Q]."""
    rows, columns = scores.shape
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    i, j = torch.arange(rows, device=scores.device), torch.arange(columns, device=scores.device)
    candidate = i[:, None] != j[None, :]
    if exclude is not None:
        candidate = candidate & (exclude[0][:, None] != exclude[1][None, :])
    positive = scores.diagonal()
    row_positive = F.pad(positive, (0, rows - positive.shape[0]))
    column_positive = F.pad(positive, (0, columns - positive.shape[0]))
    row_loss = column_loss = None
    if direction != "x_to_y":
        paired = candidate & (j < rows)[None, :]
        column_loss = row_losses(scores.T, column_positive, paired.T, margin, hardest)
    if direction != "y_to_x":
        if negative_scores is not None:
            scores = torch.cat([scores, negative_scores], 1)
            extra = torch.ones_like(negative_scores, dtype=torch.bool)
            if exclude is not None and len(exclude) == 3:
                extra = exclude[0][:, None] != exclude[2][None, :]
            candidate = torch.cat([candidate, extra], 1)
        paired = candidate & (i < columns)[:, None]
        row_loss = row_losses(scores, row_positive, paired, margin, hardest)
    return row_loss, column_loss
