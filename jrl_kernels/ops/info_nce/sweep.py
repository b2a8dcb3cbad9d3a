"""What a backend of the contrastive losses implements, and the arithmetic around it that all of them share.

A backend visits the logits s = scale * x @ y.T (or scale * scores) tile by tile and keeps only sums per row and per column:

    prepare(tensor) -> Tensor                                        matrix operands as its kernels take them
    statistics(source, options) -> Statistics                        one sweep over the logits, both directions
    softmax_gradient(source, options, upstream) -> (tile, block)     dL/ds tile by tile, positives included
    sigmoid_sums(source, positives) -> (row sums, pair logits)       the same for the sigmoid loss
    sigmoid_gradient(source, positives, upstream) -> (tile, block)

so nothing of size M x N is ever stored. The few positive pairs given as a list are kept as their own vector of logits; in the
gradient their entries of a tile are overwritten with values computed in full precision, which avoids the cancellation
p_ii - 1 in a half-precision tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._positives import Groups, Positives


class Options(NamedTuple):
    """What to accumulate, and which pairs count."""

    positives: Positives
    exclude_x: (
        Tensor | None
    )  # int64 [M]; a pair with equal ids leaves the softmax unless it is a positive by id
    exclude_y: Tensor | None  # int64 [N]
    rows: bool
    columns: bool
    multi_positive: str  # "mean" or "sum"
    details: bool  # arg-max, expectation and candidate counts too


class Axis(NamedTuple):
    """Sums over the candidates of each row (or each column), in the accumulation dtype.

    `positive` is the sum ("mean") or the log-sum-exp ("sum") of the logits of positives by id. The last four are None unless
    details were asked for; `argmax` is the lowest index among ties, -1 where there is no candidate.
    """

    log_sum_exp: Tensor
    positive: Tensor | None = None
    maximum: Tensor | None = None
    argmax: Tensor | None = None  # int64
    expectation: Tensor | None = None  # sum_j softmax(s)_j s_j
    candidates: Tensor | None = None


class Statistics(NamedTuple):
    rows: Axis | None
    columns: Axis | None
    pair_logits: Tensor | None  # [pairs], where the positives are a list


class Upstream(NamedTuple):
    """What dL/ds of a softmax loss is made of, besides the logits; a side is None where its direction is not wanted.

    G_ij = grad_x_i exp(s_ij - log_sum_exp_x_i) + the same for y, less the positives' part. For positives by id that part is
    "mean": positive_x_i + positive_y_j (grad over count); "sum": grad_x_i exp(s_ij - positive_x_i) + the same for y. For a list
    of pairs, `pair_gradient` is the whole of G at each of them. A row without positives has grad 0 and log-sums of +inf.
    """

    grad_x: Tensor | None  # [M]
    log_sum_exp_x: Tensor | None
    positive_x: Tensor | None
    grad_y: Tensor | None  # [N]
    log_sum_exp_y: Tensor | None
    positive_y: Tensor | None
    pair_gradient: Tensor | None  # [pairs]


def merge(a: Axis, b: Axis, shift: int = 0) -> Axis:
    """The sums over two disjoint sets of candidates; `shift` is added to b's indices."""
    total = torch.logaddexp(a.log_sum_exp, b.log_sum_exp)
    if a.maximum is None or b.maximum is None:
        return a._replace(log_sum_exp=total)
    assert a.argmax is not None and b.argmax is not None
    assert a.expectation is not None and b.expectation is not None
    assert a.candidates is not None and b.candidates is not None
    other = torch.where(b.argmax < 0, b.argmax, b.argmax + shift)
    better = (b.maximum > a.maximum) | (
        (b.maximum == a.maximum) & (other >= 0) & ((other < a.argmax) | (a.argmax < 0))
    )
    nothing = total == -torch.inf
    share_a = torch.where(nothing, 0.0, (a.log_sum_exp - total).exp())
    share_b = torch.where(nothing, 0.0, (b.log_sum_exp - total).exp())
    return Axis(
        total,
        a.positive,
        torch.where(better, b.maximum, a.maximum),
        torch.where(better, other, a.argmax),
        share_a * a.expectation + share_b * b.expectation,
        a.candidates + b.candidates,
    )


def of_pairs(groups: Groups, others: Tensor, logits: Tensor, keep: Tensor, details: bool) -> Axis:
    """The sums over the listed pairs that `keep` selects, grouped by one side; `others` are their indices on the other."""
    kept = torch.where(keep, logits, -torch.inf)
    total = groups.log_sum_exp(kept)
    if not details:
        return Axis(total)
    top = groups.reduce(kept, "max")
    far = torch.iinfo(torch.int32).max
    # float64 holds every index exactly, and segment_reduce takes floats only.
    place = groups.reduce(torch.where(keep & (kept == top[groups.key]), others, far).double(), "min")
    probability = torch.where(keep, (kept - total[groups.key]).exp(), 0.0)
    return Axis(
        total,
        None,
        top,
        torch.where(place >= far, -1, place.nan_to_num(posinf=far)).to(torch.int64),
        groups.reduce(torch.where(keep, probability * logits, 0.0), "sum"),
        groups.reduce(keep.to(logits.dtype), "sum"),
    )
