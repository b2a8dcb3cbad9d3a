"""The contrastive losses as their papers write them: dense logits, one softmax a row. Works in float64, twice differentiable."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..._positives import Positives


class RowLosses(NamedTuple):
    """Losses of the rows of one direction, and what can be read off their softmax. All [rows]; rows without a positive are 0."""

    loss: Tensor
    valid: Tensor  # bool: the row has a positive
    correct: Tensor  # the largest candidate (lowest index among ties) is a positive
    entropy: Tensor  # nats
    candidates: Tensor  # how many keys the softmax ranges over


def logits(
    x: Tensor | None, y: Tensor | None, scores: Tensor | None, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """s = scale * x @ y.T + bias (or scale * scores + bias), in float32 or float64."""
    if scores is not None:
        dots = scores.to(torch.promote_types(scores.dtype, torch.float32))
    else:
        assert x is not None and y is not None
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            dots = x.to(wide) @ y.to(wide).T
    return dots * scale if bias is None else dots * scale + bias


def positive_mask(positives: Positives, rows: int, columns: int) -> Tensor:
    """Dense boolean [rows, columns] of the positive pairs."""
    if positives.x_ids is not None and positives.y_ids is not None:
        return positives.x_ids[:, None] == positives.y_ids[None, :]
    assert positives.rows is not None and positives.columns is not None
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=positives.rows.device)
    return mask.index_put(
        (positives.rows, positives.columns), torch.ones((), dtype=torch.bool, device=mask.device)
    )


def row_losses(logits: Tensor, positive: Tensor, excluded: Tensor | None, multi_positive: str) -> RowLosses:
    """loss_i = LSE_j s_ij - mean_{p in P_i} s_ip, or - LSE_{p in P_i} s_ip for multi_positive="sum"."""
    if logits.shape[1] == 0:
        nothing = logits.sum(1)
        return RowLosses(nothing, torch.zeros_like(nothing, dtype=torch.bool), *(nothing.detach(),) * 3)
    if excluded is not None:
        logits = logits.masked_fill(excluded & ~positive, -math.inf)
    candidates = (
        torch.full_like(logits[:, 0], logits.shape[1])
        if excluded is None
        else ((~excluded | positive).sum(1).to(logits.dtype))
    )
    count = positive.sum(1)
    valid = count > 0
    # A row without a positive is replaced before the softmax, so that neither its value nor its gradient is NaN.
    logits = torch.where(valid[:, None], logits, 0.0)
    log_sum = torch.logsumexp(logits, 1)
    if multi_positive == "mean":
        positive_term = torch.where(positive, logits, 0.0).sum(1) / count.clamp(min=1)
    else:
        hits = torch.where(valid[:, None] & ~positive, -math.inf, logits)
        positive_term = torch.logsumexp(hits, 1)
    loss = torch.where(valid, log_sum - positive_term, 0.0)
    with torch.no_grad():
        log_probability = torch.log_softmax(logits, 1)
        entropy = -torch.where(logits == -math.inf, 0.0, log_probability.exp() * log_probability).sum(1)
        correct = positive.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    zero = torch.zeros_like(loss)
    return RowLosses(
        loss,
        valid,
        torch.where(valid, correct.to(loss.dtype), zero),
        torch.where(valid, entropy, zero),
        torch.where(valid, candidates, zero),
    )


def info_nce(
    logits: Tensor,
    negative_logits: Tensor | None,
    positives: Positives,
    exclude: tuple[Tensor, ...] | None,
    direction: str,
    multi_positive: str,
) -> tuple[RowLosses | None, RowLosses | None]:
    """Row losses of each direction wanted, from logits [M, N] and the extra keys' logits [M, Q]."""
    positive = positive_mask(positives, *logits.shape)
    excluded = None if exclude is None else exclude[0][:, None] == exclude[1][None, :]
    rows = columns = None
    if direction != "x_to_y":
        columns = row_losses(logits.T, positive.T, None if excluded is None else excluded.T, multi_positive)
    if direction != "y_to_x":
        if negative_logits is not None:
            logits = torch.cat([logits, negative_logits], 1)
            positive = F.pad(positive, (0, negative_logits.shape[1]))
            if exclude is not None and excluded is not None:
                extra = (
                    exclude[0][:, None] == exclude[2][None, :]
                    if len(exclude) == 3
                    else torch.zeros_like(negative_logits, dtype=torch.bool)
                )
                excluded = torch.cat([excluded, extra], 1)
        rows = row_losses(logits, positive, excluded, multi_positive)
    return rows, columns


def sigmoid_contrastive(logits: Tensor, positives: Positives) -> Tensor:
    """- sum_j log sigmoid(z_ij s_ij) for each row i, z_ij = 1 for a positive pair and -1 otherwise."""
    positive = positive_mask(positives, *logits.shape)
    return F.softplus(torch.where(positive, -logits, logits)).sum(1)
