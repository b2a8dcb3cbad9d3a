"""info_nce and info_nce_from_scores: the softmax contrastive losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks, _dispatch
from ..._positives import Positives, exclusions, group, parse
from . import autograd, reference  # noqa: F401  (autograd registers torch.ops.jrl.info_nce_*)
from .backends import BACKENDS as BACKENDS
from .reference import RowLosses

DIRECTIONS = ("both", "x_to_y", "y_to_x")
Loss = Tensor | tuple[Tensor, Tensor]


class InfoNCEStatistics(NamedTuple):
    """Means over the rows that have a positive, detached 0-d tensors; None for a direction that was not computed.

    Accuracy: how often the largest candidate (lowest index among ties) is a positive. Entropy: of the softmax, in nats. Bound:
    log of the number of candidates less the loss, a lower bound of the mutual information in nats with one positive a row.
    """

    accuracy_x_to_y: Tensor | None
    accuracy_y_to_x: Tensor | None
    entropy_x_to_y: Tensor | None
    entropy_y_to_x: Tensor | None
    bound_x_to_y: Tensor | None
    bound_y_to_x: Tensor | None


def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    positives: Any = None,
    negatives: Tensor | None = None,
    exclude: Any = None,
    direction: str = "both",
    multi_positive: str = "mean",
    weights: Any = None,
    normalize: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    """InfoNCE (CLIP, NT-Xent, supervised contrastive, MoCo, MIL-NCE) without the matrix of logits.

    With s_ij = scale * x_i . y_j + bias, P_i the positives of row i and C_i its candidates::

        loss_i = LSE_{j in C_i} s_ij - (1/|P_i|) sum_{p in P_i} s_ip        multi_positive="mean"
        loss_i = LSE_{j in C_i} s_ij - LSE_{p in P_i} s_ip                  multi_positive="sum"

    and the same for the columns; direction="both" is the mean of the two. A row without a positive contributes exactly nothing.
    Sources: van den Oord et al. 2018; Radford et al. 2021 ("both"); Khosla et al. 2020 ("mean"); the GroupViT patent and Miech
    et al. 2020 ("sum"). Unlike theirs, memory is O((M + N) D): logits are recomputed in the backward.

    Args:
        x: [M, D], float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        y: [N, D], like x.
        scale: inverse temperature, a number or a 0-d tensor (with gradient).
        bias: added to every logit; a softmax cancels it, so its gradient is zero. Taken so that models with one fit.
        positives: None (row i with row i); int64 [M], the row of y for each row of x; a pair of int64 ids ([M], [N]), positive
            where equal; or a sparse CSR boolean matrix [M, N].
        negatives: [Q, D], more keys for the rows of x, without gradient (a queue).
        exclude: int64 ids ([M], [N]), or with a third [Q] for `negatives`, or one [M] for both sides; a pair with equal ids
            leaves the softmax unless it is a positive.
        direction: "both", "x_to_y" (rows of x choose among y) or "y_to_x".
        multi_positive: how several positives combine, "mean" or "sum".
        weights: [M], or a pair ([M], [N]), of row weights. One vector gives a column the mean weight of its positives' rows,
            and needs positives that are not ids unless direction="x_to_y".
        normalize: divide the rows of x, y and negatives by their Euclidean norm first.
        reduction: "mean" (weighted, over rows with a positive), "sum" or "none".
        return_stats: also return InfoNCEStatistics, from the same sweep.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A 0-d float32 (float64) loss; with reduction="none" [M], [N] or for "both" the pair of them. With return_stats, a tuple
        (loss, InfoNCEStatistics).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: x, y, scale (bias: zero); once differentiable, twice with backend="reference".
    """
    op = "info_nce"
    _checks.matrix(op, "x", x)
    _checks.matrix(op, "y", y, columns=x.shape[1])
    if negatives is not None:
        _checks.matrix(op, "negatives", negatives, columns=x.shape[1])
        _checks.same_device(op, "negatives", negatives, "x", x)
        negatives = negatives.detach()
    _checks.same_device(op, "y", y, "x", x)
    x, y, negatives = _checks.autocast(x, y, negatives)  # type: ignore[assignment]
    _checks.same_dtype(op, "y", y, "x", x)
    if negatives is not None:
        _checks.same_dtype(op, "negatives", negatives, "x", x)
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        negatives = None if negatives is None else F.normalize(negatives, dim=1)
    operands = (x, y, None, _checks.scalar(op, "scale", scale, "x", x), negatives)
    offset = None if bias is None else _checks.scalar(op, "bias", bias, "x", x)
    shape = x.shape[0], y.shape[0]
    return _loss(
        op,
        operands,
        offset,
        shape,
        positives,
        exclude,
        direction,
        multi_positive,
        weights,
        reduction,
        return_stats,
        backend,
    )


def info_nce_from_scores(
    scores: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    positives: Any = None,
    exclude: Any = None,
    direction: str = "both",
    multi_positive: str = "mean",
    weights: Any = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    """The loss of `info_nce` over a matrix of scores that a critic has made: s_ij = scale * scores_ij + bias.

    Args:
        scores: [M, N], rows contrast columns; float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        scale, bias, positives, exclude, direction, multi_positive, weights, reduction, return_stats, backend: as in `info_nce`.

    Returns, Raises: as in `info_nce`. Nothing of the scores' size is made but their gradient.

    Gradients: scores, scale (bias: zero); once differentiable, twice with backend="reference".
    """
    op = "info_nce_from_scores"
    _checks.matrix(op, "scores", scores)
    operands = (None, None, scores, _checks.scalar(op, "scale", scale, "scores", scores), None)
    offset = None if bias is None else _checks.scalar(op, "bias", bias, "scores", scores)
    shape = scores.shape[0], scores.shape[1]
    return _loss(
        op,
        operands,
        offset,
        shape,
        positives,
        exclude,
        direction,
        multi_positive,
        weights,
        reduction,
        return_stats,
        backend,
    )


def _loss(
    op: str,
    operands: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None],
    bias: Tensor | None,
    shape: tuple[int, int],
    positives: Any,
    exclude: Any,
    direction: str,
    multi_positive: str,
    weights: Any,
    reduction: str,
    return_stats: bool,
    backend: str,
) -> Any:
    x, _, scores, _, negatives = operands
    first = x if scores is None else scores
    assert first is not None
    _checks.choice(op, "direction", direction, DIRECTIONS)
    _checks.choice(op, "multi_positive", multi_positive, ("mean", "sum"))
    _checks.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    which = parse(op, positives, *shape, first)
    excluded = exclusions(op, exclude, shape, negatives, first)
    weight_x, weight_y = _weights(op, weights, which, shape, direction, first)
    name = _dispatch.select(op, backend, "info_nce", first)
    if name == "reference":
        rows, columns = _reference(operands, bias, which, excluded, direction, multi_positive)
    else:
        rows, columns = _fused(operands, which, excluded, direction, multi_positive, return_stats, name)
    losses = [
        _reduce(side, weight, reduction)
        for side, weight in ((rows, weight_x), (columns, weight_y))
        if side is not None
    ]
    if bias is not None and name != "reference":
        losses = [loss + 0.0 * bias for loss in losses]
    if reduction == "none":
        result: Loss = losses[0] if len(losses) == 1 else (losses[0], losses[1])
    else:
        result = losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2
    return (result, _statistics(rows, columns)) if return_stats else result


def _weights(
    op: str, weights: Any, positives: Positives, shape: tuple[int, int], direction: str, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if weights is None:
        return None, None
    dtype = _checks.accumulation(like.dtype)
    if isinstance(weights, (tuple, list)):
        if len(weights) != 2:
            raise ValueError(f"{op}: weights must be [M] or a pair ([M], [N]), got {len(weights)} items")
        return (
            _checks.vector(op, "weights[0]", weights[0], shape[0], "x", like).to(dtype),
            _checks.vector(op, "weights[1]", weights[1], shape[1], "x", like).to(dtype),
        )
    weight = _checks.vector(op, "weights", weights, shape[0], "x", like).to(dtype)
    if direction == "x_to_y":
        return weight, None
    if positives.rows is None or positives.columns is None:
        raise ValueError(
            f"{op}: weights for positives given as ids must be a pair ([M], [N]), got one vector"
        )
    columns = group(positives.columns, shape[1], in_order=False)
    total = columns.reduce(weight[positives.rows], "sum")
    return weight, total / columns.counts().clamp(min=1)


def _reference(
    operands: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None],
    bias: Tensor | None,
    positives: Positives,
    exclude: tuple[Tensor, ...] | None,
    direction: str,
    multi_positive: str,
) -> tuple[RowLosses | None, RowLosses | None]:
    x, y, scores, scale, negatives = operands
    logits = reference.logits(x, y, scores, scale, bias)
    extra = None if negatives is None else reference.logits(x, negatives, None, scale, bias)
    return reference.info_nce(logits, extra, positives, exclude, direction, multi_positive)


def _fused(
    operands: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None],
    positives: Positives,
    exclude: tuple[Tensor, ...] | None,
    direction: str,
    multi_positive: str,
    details: bool,
    backend: str,
) -> tuple[RowLosses | None, RowLosses | None]:
    padded = (*(exclude or ()), None, None, None)[:3]
    loss_x, loss_y, state_x, state_y, _ = torch.ops.jrl.info_nce_forward(
        *operands, *positives, *padded, direction, multi_positive, details, backend
    )
    rows = None if direction == "y_to_x" else row_losses(loss_x, state_x)
    columns = None if direction == "x_to_y" else row_losses(loss_y, state_y)
    return rows, columns


def row_losses(loss: Tensor, state: Tensor) -> RowLosses:
    """A direction's losses and state; what the statistics are of is 0 where a row has no positive."""
    valid = state[2] > 0
    correct, entropy, candidates = (torch.where(valid, part, 0.0) for part in state[3:6])
    return RowLosses(loss, valid, correct, entropy, candidates)


def _reduce(side: RowLosses, weight: Tensor | None, reduction: str) -> Tensor:
    loss = side.loss if weight is None else side.loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    share = side.valid.to(loss.dtype)
    if weight is not None:
        share = share * weight
    total = share.sum()
    return loss.sum() / torch.where(total == 0, 1.0, total)


def _statistics(rows: RowLosses | None, columns: RowLosses | None) -> InfoNCEStatistics:
    def means(side: RowLosses | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if side is None:
            return None, None, None
        count = side.valid.sum().clamp(min=1)
        ceiling = torch.where(side.valid, side.candidates.clamp(min=1).log(), 0.0)
        return (
            side.correct.sum() / count,
            side.entropy.sum() / count,
            (ceiling - side.loss.detach()).sum() / count,
        )

    accuracy_x, entropy_x, bound_x = means(rows)
    accuracy_y, entropy_y, bound_y = means(columns)
    return InfoNCEStatistics(accuracy_x, accuracy_y, entropy_x, entropy_y, bound_x, bound_y)
