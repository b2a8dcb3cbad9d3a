"""The CPU backend: a C++ loop of the extension reads each gathered row once, for its score and for its share of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import accumulation
from ..._extension import launch, pointer

GATHERED_ELEMENTS = 1 << 22


def _launch(
    query: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    positive_mask: Tensor | None,
    constants: tuple[float, float],
    losses: Tensor,
    direction: Tensor | None,
) -> None:
    launch(
        f"partition_nce_{'f64' if query.dtype == torch.float64 else 'f32'}_cpu",
        *query.shape,
        pointer(query),
        pointer(bank),
        bank.shape[0],
        bank.stride(0),
        positive_index.shape[1],
        pointer(positive_index),
        pointer(positive_mask),
        negative_index.shape[1],
        pointer(negative_index),
        *constants,
        pointer(losses),
        pointer(direction),
    )


def forward(
    query: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    positive_mask: Tensor | None,
    scale: Tensor,
    log_constant: Tensor,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Row losses [B] and, with `gradient`, each row's sum of d loss / d s times its row of the bank, [B, D]."""
    dtype = accumulation(query.dtype)
    losses = torch.empty(query.shape[0], dtype=dtype)
    direction = torch.empty(query.shape, dtype=dtype) if gradient else None
    constants = float(scale), float(log_constant)
    if query.dtype == dtype:
        _launch(query, bank, positive_index, negative_index, positive_mask, constants, losses, direction)
        return losses, direction
    # A bank in half precision is widened a few queries' rows at a time: as a whole it would double.
    positives, negatives = positive_index.shape[1], negative_index.shape[1]
    step = max(1, GATHERED_ELEMENTS // max(1, (positives + negatives) * query.shape[1]))
    for start in range(0, query.shape[0], step):
        some = slice(start, start + step)
        index = torch.cat([positive_index[some].flatten(), negative_index[some].flatten()])
        place = torch.arange(index.numel())
        split = positive_index[some].numel()
        _launch(
            query[some].to(dtype),
            bank.index_select(0, index).to(dtype),
            place[:split].view(-1, positives),
            place[split:].view(-1, negatives),
            None if positive_mask is None else positive_mask[some],
            constants,
            losses[some],
            None if direction is None else direction[some],
        )
    return losses, direction
