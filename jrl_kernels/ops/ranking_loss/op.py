"""ranking_loss and ranking_loss_from_scores: the hinge losses of image-text retrieval."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks, _dispatch
from ..._positives import exclusions
from . import autograd, reference  # noqa: F401  (autograd registers torch.ops.jrl.ranking_loss_*)
from .backends import BACKENDS as BACKENDS

DIRECTIONS = ("both", "x_to_y", "y_to_x")
METRICS = ("cosine", "dot", "order")
REDUCTIONS = ("sum", "mean", "none")
Loss = Tensor | tuple[Tensor, Tensor]


def ranking_loss(
    x: Tensor,
    y: Tensor,
    *,
    margin: float = 0.2,
    metric: str = "cosine",
    negatives: Tensor | None = None,
    hardest: bool = False,
    direction: str = "both",
    exclude: Any = None,
    reduction: str = "sum",
    backend: str = "auto",
) -> Loss:
    """The triplet hinge loss with all negatives or the hardest one (VSE, VSE++, SJE, order embeddings), without the scores.

    With s_ij the score of x_i with y_j, y_i the positive of x_i, and C_i the candidates j != i that are not excluded::

        loss_i = sum_{j in C_i} max(0, margin - s_ii + s_ij)               hardest=False
        loss_i = max(0, margin - s_ii + max_{j in C_i} s_ij)               hardest=True

    and the same for the columns. Unlike in `info_nce`, direction="both" is the sum of the two directions, as every source has
    it. The scores are never stored: the sums' backward computes them again, the hardest's keeps one index a row.
    Sources: Kiros et al. 2014 (VSE); Faghri et al. 2018 (VSE++, `hardest`); Reed et al. 2016 (SJE); Vendrov et al. 2016 (order);
    Yuan et al. 2021 (a queue as negatives).

    Args:
        x: [M, D], float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        y: [N, D], like x. Row i of x and row i of y are each other's positives; a row beyond the shorter side has none: it is
            a candidate for the others and contributes no loss of its own.
        margin: in units of the score, at least 0.
        metric: "cosine"; "dot"; or "order", s_ij = -sum_d max(0, y_jd - x_id)^2 with x the image side, used as given (order
            embeddings take absolute values of unit vectors first).
        negatives: [Q, D], more candidates for the rows of x, without gradient (a queue).
        hardest: the largest violation (lowest index among ties) instead of the sum of all.
        direction: "both", "x_to_y" (rows of x choose among y) or "y_to_x".
        exclude: int64 ids ([M], [N]), or with a third [Q] for `negatives`, or one [M] for both sides; a pair with equal ids
            is no candidate. One [M] of equal ids leaves only the queue.
        reduction: "sum"; "mean" over the rows that have a positive, plus for "both" the mean over such columns; or "none".
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A 0-d float32 (float64) loss; with reduction="none" [M], [N] or for "both" the pair of them.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: x, y, zero where a violation is exactly 0; once differentiable, twice with backend="reference".
    """
    op = "ranking_loss"
    _checks.matrix(op, "x", x)
    _checks.matrix(op, "y", y, columns=x.shape[1])
    _checks.choice(op, "metric", metric, METRICS)
    if negatives is not None:
        _checks.matrix(op, "negatives", negatives, columns=x.shape[1])
        _checks.same_device(op, "negatives", negatives, "x", x)
        negatives = negatives.detach()
    _checks.same_device(op, "y", y, "x", x)
    x, y, negatives = _checks.autocast(x, y, negatives)  # type: ignore[assignment]
    _checks.same_dtype(op, "y", y, "x", x)
    if negatives is not None:
        _checks.same_dtype(op, "negatives", negatives, "x", x)
    if metric == "cosine":
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        negatives = None if negatives is None else F.normalize(negatives, dim=1)
        metric = "dot"
    shape = x.shape[0], y.shape[0]
    return _loss(
        op, (x, y, None, negatives), shape, margin, metric, hardest, direction, exclude, reduction, backend
    )


def ranking_loss_from_scores(
    scores: Tensor,
    *,
    margin: float = 0.2,
    hardest: bool = False,
    direction: str = "both",
    exclude: Any = None,
    reduction: str = "sum",
    backend: str = "auto",
) -> Loss:
    """The loss of `ranking_loss` over a matrix of scores that a critic has made (DVSA, SCAN).

    Args:
        scores: [M, N], the positives on its diagonal; float32, bfloat16 or float16 (float64 on "reference" and "cpu"). A row
            or column beyond the shorter side has no positive and contributes no loss of its own.
        margin, hardest, direction, exclude, reduction, backend: as in `ranking_loss`.

    Returns, Raises: as in `ranking_loss`. Nothing of the scores' size is made but their gradient.

    Gradients: scores; once differentiable, twice with backend="reference".
    """
    op = "ranking_loss_from_scores"
    _checks.matrix(op, "scores", scores)
    shape = scores.shape[0], scores.shape[1]
    return _loss(
        op, (None, None, scores, None), shape, margin, "dot", hardest, direction, exclude, reduction, backend
    )


def _loss(
    op: str,
    operands: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    shape: tuple[int, int],
    margin: float,
    metric: str,
    hardest: bool,
    direction: str,
    exclude: Any,
    reduction: str,
    backend: str,
) -> Loss:
    x, y, scores, negatives = operands
    first = x if scores is None else scores
    assert first is not None
    margin = _checks.number(op, "margin", margin, minimum=0.0)
    if not isinstance(hardest, bool):
        raise TypeError(f"{op}: hardest must be a bool, got {_checks.describe(hardest)}")
    _checks.choice(op, "direction", direction, DIRECTIONS)
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    excluded = exclusions(op, exclude, shape, negatives, first)
    name = _dispatch.select(op, backend, "ranking_loss", first)
    rows: Tensor | None
    columns: Tensor | None
    if name == "reference":
        extra = None if negatives is None or x is None else reference.scores(x, negatives, metric)
        dense = scores if x is None or y is None else reference.scores(x, y, metric)
        assert dense is not None
        rows, columns = reference.ranking_loss(dense, extra, excluded, margin, hardest, direction)
    else:
        ids = (*(excluded or ()), None, None, None)[:3]
        rows, columns, *_ = torch.ops.jrl.ranking_loss_forward(
            *operands, *ids, margin, metric, hardest, direction, name
        )
    losses = [
        _reduce(side, min(shape), reduction)
        for side, other in ((rows, "y_to_x"), (columns, "x_to_y"))
        if side is not None and direction != other
    ]
    if len(losses) == 1:
        return losses[0]
    return (losses[0], losses[1]) if reduction == "none" else losses[0] + losses[1]


def _reduce(loss: Tensor, positives: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(positives, 1)
