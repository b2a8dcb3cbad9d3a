"""What a backend of the ranking loss implements, and the gradients of the few pairs that all of them treat alike.

A backend visits the scores tile by tile and keeps two numbers a row and a column:

    prepare(tensor) -> Tensor                                            matrix operands as its kernels take them
    positive_scores(source, options) -> [K]                              s_ii
    statistics(source, options, base) -> (rows, columns)                 one sweep over the scores, both directions
    gradient(source, options, base, grad_x, grad_y) -> (tile, block)     dL/ds tile by tile, for the sum of violations
    accumulate_order(g, x, y, dx, dy)                                    what follows from a tile of dL/ds, metric "order"

The first K = min(M, N) rows and columns have a positive, the diagonal; `base` [K] is margin - s_ii. A tile of dL/ds is zero on
the diagonal: what all of a row's violations do to its positive is added from their saved number, in the accumulation dtype,
which a half-precision tile could not hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._positives import group


class Options(NamedTuple):
    """What to accumulate, and which pairs are candidates."""

    metric: str  # "dot" (or a matrix of scores) or "order"
    hardest: bool
    exclude_x: Tensor | None  # int64 [M]; a pair with equal ids is no candidate
    exclude_y: Tensor | None  # int64 [N]
    rows: bool
    columns: bool
    pairs: int  # K
    shift: int  # index of the first column: 0, or N for a queue that follows the columns


class Side(NamedTuple):
    """Of each row (or column) that has a positive: sum and number of its violations, or largest score and its index."""

    value: Tensor  # [K], in the accumulation dtype; the largest score is -inf without a candidate, NaN where one is
    number: Tensor  # int64 [K]; the index is the lowest among ties, -1 without a candidate


def join(batch: Side, queue: Side, hardest: bool) -> Side:
    """The statistics over two disjoint sets of candidates, those of `queue` with the higher indices."""
    if not hardest:
        return Side(batch.value + queue.value, batch.number + queue.number)
    better = ~(queue.value <= batch.value) & ~batch.value.isnan()
    return Side(
        torch.where(better, queue.value, batch.value), torch.where(better, queue.number, batch.number)
    )


def pair_scores(metric: str, x: Tensor, y: Tensor) -> Tensor:
    """The score of each row of x with the same row of y."""
    if metric == "dot":
        return (x * y).sum(1)
    return -(y - x).clamp(min=0).square().sum(1)


def pair_gradients(metric: str, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight times the derivative of those scores by x and by y; exactly zero where `weight` is."""
    if metric == "dot":
        to_x, to_y = y, x
    else:
        to_x = 2 * (y - x).clamp(min=0)
        to_y = -to_x
    used, weight = (weight != 0)[:, None], weight[:, None]
    return torch.where(used, weight * to_x, 0.0), torch.where(used, weight * to_y, 0.0)


def segment_sum(values: Tensor, index: Tensor, length: int) -> Tensor:
    """Rows of `values` [n, D] summed by `index` into [length, D], always in the same order; an index of `length` is left out."""
    return group(index, length, in_order=False).reduce(values, "sum")
