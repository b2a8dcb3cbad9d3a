"""torch.ops.jrl.partition_nce_forward and its backward.

No softmax joins the terms of a row, so the forward knows each one's slope as soon as it has its score: while a row of the bank is
at hand, it also adds that row's share to the gradient. The backward reads the bank no more.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._checks import accumulation
from ..._operators import register
from .backends import BACKENDS


def _forward(
    query: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    positive_mask: Tensor | None,
    scale: Tensor,
    log_constant: Tensor,
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    implementation: Any = BACKENDS[backend].load()
    # Rows of the bank may lie apart, but not their elements: it is too large to be packed at every call.
    bank = bank if bank.stride(1) == 1 or bank.shape[1] == 1 else bank.contiguous()
    if positive_mask is not None:
        positive_mask = positive_mask.contiguous()
    losses, direction = implementation.forward(
        query.contiguous(),
        bank,
        positive_index.contiguous(),
        negative_index.contiguous(),
        positive_mask,
        scale,
        log_constant,
        gradient,
    )
    return losses, losses.new_empty(0, 0) if direction is None else direction


def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    losses = query.new_empty(query.shape[0], dtype=accumulation(query.dtype))
    return losses, losses.new_empty(tuple(query.shape) if rest[-2] else (0, 0))


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    query, scale, direction = arguments[0], arguments[5], arguments[7]
    wanted = arguments[8]
    weighted = grad[:, None] * direction
    return (
        scale * weighted if wanted[0] else None,
        (weighted * query.to(weighted.dtype)).sum() if wanted[1] else None,
    )


register(
    "partition_nce",
    inputs="Tensor query, Tensor bank, Tensor positive_index, Tensor negative_index, Tensor? positive_mask, Tensor scale, "
    "Tensor log_constant",
    options="bool gradient, str backend",
    outputs=("losses", "direction"),
    gradients=("query", "scale"),
    forward=_forward,
    fake=_forward_fake,
    backward=_backward,
)
