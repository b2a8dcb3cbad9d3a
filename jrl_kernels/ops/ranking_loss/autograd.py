"""torch.ops.jrl.ranking_loss_forward and its backward: schema, kernels' glue, fake implementations, autograd.

The operators return the losses of every row of each direction. `state` of a direction, int64 [K], is what its backward needs of
each row that has a positive: how many candidates violate its margin, or with `hardest` which one does, -1 for none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import accumulation
from ..._operators import register
from ..._sweep import Gradients, GradientTile, Source, Wanted, gradients
from .backends import BACKENDS
from .sweep import Options, Side, join, pair_gradients, segment_sum


class _Problem:
    """The operands of one call, prepared for a backend."""

    def __init__(
        self,
        x: Tensor | None,
        y: Tensor | None,
        scores: Tensor | None,
        negatives: Tensor | None,
        exclude_x: Tensor | None,
        exclude_y: Tensor | None,
        exclude_negatives: Tensor | None,
        margin: float,
        metric: str,
        hardest: bool,
        direction: str,
        backend: str,
    ) -> None:
        self.implementation: Any = BACKENDS[backend].load()

        def prepared(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else self.implementation.prepare(tensor)

        def packed(ids: Tensor | None) -> Tensor | None:
            return None if ids is None else ids.contiguous()

        first = x if scores is None else scores
        assert first is not None
        unit = torch.ones((), dtype=accumulation(first.dtype), device=first.device)
        self.source = Source(prepared(x), prepared(y), prepared(scores), unit)
        self.margin = margin
        pairs = min(self.source.shape)
        by_row, by_column = direction != "y_to_x", direction != "x_to_y"
        self.options = Options(
            metric, hardest, packed(exclude_x), packed(exclude_y), by_row, by_column, pairs, 0
        )
        self.negatives: tuple[Source, Options] | None = None
        if negatives is not None and by_row:
            extra = packed(exclude_negatives)
            self.negatives = (
                self.source._replace(y=prepared(negatives)),
                self.options._replace(
                    exclude_x=None if extra is None else self.options.exclude_x,
                    exclude_y=extra,
                    columns=False,
                    shift=self.source.shape[1],
                ),
            )

    def paired(self) -> tuple[Tensor, Tensor]:
        """The rows of x and of y that are each other's positives, in the accumulation dtype."""
        source, pairs = self.source, self.options.pairs
        assert source.x is not None and source.y is not None
        return source.x[:pairs].to(source.dtype), source.y[:pairs].to(source.dtype)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _Problem(*arguments)
    source, options = problem.source, problem.options
    positive = problem.implementation.positive_scores(source, options)
    base = problem.margin - positive
    rows, columns = problem.implementation.statistics(source, options, base)
    if rows is not None and problem.negatives is not None:
        extra, _ = problem.implementation.statistics(*problem.negatives, base)
        rows = join(rows, extra, options.hardest)
    loss_x, state_x = _finish(rows, base, options.hardest, source.shape[0])
    loss_y, state_y = _finish(columns, base, options.hardest, source.shape[1])
    return loss_x, loss_y, state_x, state_y, positive


def _finish(side: Side | None, base: Tensor, hardest: bool, length: int) -> tuple[Tensor, Tensor]:
    if side is None:
        return base.new_empty(0), torch.empty(0, dtype=torch.int64, device=base.device)
    loss, state = side
    if hardest:
        violation = base + side.value
        violated = (side.number >= 0) & ~(violation <= 0)
        loss, state = torch.where(violated, violation, 0.0), torch.where(violated, side.number, -1)
    return F.pad(loss, (0, length - loss.shape[0])), state


def _backward(grad_x: Tensor, grad_y: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    *inputs, state_x, state_y, positive, wanted_flags = arguments[:-5]
    problem = _Problem(*inputs, *arguments[-5:])
    options = problem.options
    x = grad_x[: options.pairs].contiguous() if options.rows else None
    y = grad_y[: options.pairs].contiguous() if options.columns else None
    for_x, for_y, for_scores = wanted_flags
    wanted = Wanted(for_x, for_y, for_scores, scale=False)
    if options.hardest:
        found = _hardest_gradients(problem, x, y, state_x, state_y)
    else:
        found = _sum_gradients(problem, problem.margin - positive, x, y, state_x, state_y, wanted)
    return found.x, found.y, found.scores


def _sum_gradients(
    problem: _Problem,
    base: Tensor,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    state_x: Tensor,
    state_y: Tensor,
    wanted: Wanted,
) -> Gradients:
    """G_ij = g_i [ij violates] + h_j [ji violates] off the diagonal, G_ii = -(g_i violations + h_i violations)."""
    implementation, source, options = problem.implementation, problem.source, problem.options
    tile, block = implementation.gradient(source, options, base, grad_x, grad_y)
    found = _multiplied(problem, source, tile, block, wanted)
    if problem.negatives is not None and wanted.x:
        extra_source, extra_options = problem.negatives
        tile, block = implementation.gradient(extra_source, extra_options, base, grad_x, None)
        extra = _multiplied(problem, extra_source, tile, block, Wanted(True, False, False, False))
        assert found.x is not None and extra.x is not None
        found.x.add_(extra.x)
    weight = torch.zeros_like(base)
    for grad, count in ((grad_x, state_x), (grad_y, state_y)):
        if grad is not None:
            weight -= torch.where(count > 0, grad * count, 0.0)
    _add_positives(problem, found, weight)
    return found


def _multiplied(
    problem: _Problem, source: Source, tile: GradientTile, block: tuple[int, int], wanted: Wanted
) -> Gradients:
    """What follows from G, tile by tile."""
    if problem.options.metric != "order":
        return gradients(source, tile, block, wanted, bias=False)
    assert source.x is not None and source.y is not None
    dx = torch.zeros_like(source.x, dtype=source.dtype) if wanted.x else None
    dy = torch.zeros_like(source.y, dtype=source.dtype) if wanted.y else None
    rows, columns = source.shape
    for r0 in range(0, rows, block[0]):
        r1 = min(r0 + block[0], rows)
        for c0 in range(0, columns, block[1]):
            c1 = min(c0 + block[1], columns)
            problem.implementation.accumulate_order(
                tile(r0, r1, c0, c1),
                source.x[r0:r1],
                source.y[c0:c1],
                None if dx is None else dx[r0:r1],
                None if dy is None else dy[c0:c1],
            )
    return Gradients(dx, dy)


def _add_positives(problem: _Problem, found: Gradients, weight: Tensor) -> None:
    """Adds `weight` [K] on the diagonal of G."""
    if found.scores is not None:
        found.scores.diagonal().add_(weight)
        return
    to_x, to_y = pair_gradients(problem.options.metric, *problem.paired(), weight)
    for total, part in ((found.x, to_x), (found.y, to_y)):
        if total is not None:
            total[: problem.options.pairs] += part


def _hardest_gradients(
    problem: _Problem, grad_x: Tensor | None, grad_y: Tensor | None, hardest_x: Tensor, hardest_y: Tensor
) -> Gradients:
    """G has one entry a row and one a column, and the diagonal: gathers and sums by segments, no sweep."""
    source, options = problem.source, problem.options
    columns = source.shape[1]
    weight = source.scale.new_zeros(options.pairs)
    if source.scores is not None:
        found = Gradients(scores=torch.zeros_like(source.scores))
    else:
        assert source.x is not None and source.y is not None
        found = Gradients(
            torch.zeros_like(source.x, dtype=source.dtype), torch.zeros_like(source.y, dtype=source.dtype)
        )
    if grad_x is not None:
        g = torch.where(hardest_x >= 0, grad_x, 0.0)
        weight -= g
        _add_row_partners(problem, found, torch.where(hardest_x < columns, g, 0.0), hardest_x)
        if problem.negatives is not None:
            _add_queue_partners(problem, found, torch.where(hardest_x >= columns, g, 0.0), hardest_x)
    if grad_y is not None:
        h = torch.where(hardest_y >= 0, grad_y, 0.0)
        weight -= h
        _add_column_partners(problem, found, h, hardest_y)
    _add_positives(problem, found, weight)
    return found


def _add_row_partners(problem: _Problem, found: Gradients, weight: Tensor, partner: Tensor) -> None:
    """Adds weight_i at (i, partner_i); no partner, or one in the queue, has weight 0."""
    source, options = problem.source, problem.options
    column = partner.clamp(0, max(source.shape[1] - 1, 0))
    if found.scores is not None:
        # One entry a row, so that none is written twice; the same below for the columns.
        place = torch.arange(options.pairs, device=column.device), column
        found.scores[place] = (found.scores[place] + weight).to(found.scores.dtype)
        return
    assert source.y is not None and found.x is not None and found.y is not None
    own, _ = problem.paired()
    to_x, to_y = pair_gradients(options.metric, own, source.y[column].to(source.dtype), weight)
    found.x[: options.pairs] += to_x
    found.y.add_(segment_sum(to_y, torch.where(weight != 0, column, source.shape[1]), source.shape[1]))


def _add_queue_partners(problem: _Problem, found: Gradients, weight: Tensor, partner: Tensor) -> None:
    assert problem.negatives is not None
    queue = problem.negatives[0].y
    assert queue is not None and found.x is not None
    if queue.shape[0] == 0:
        return
    own, _ = problem.paired()
    key = queue[(partner - problem.source.shape[1]).clamp(min=0)].to(own.dtype)
    found.x[: problem.options.pairs] += pair_gradients(problem.options.metric, own, key, weight)[0]


def _add_column_partners(problem: _Problem, found: Gradients, weight: Tensor, partner: Tensor) -> None:
    """Adds weight_j at (partner_j, j); no partner has weight 0."""
    source, options = problem.source, problem.options
    row = partner.clamp(min=0)
    if found.scores is not None:
        place = row, torch.arange(options.pairs, device=row.device)
        found.scores[place] = (found.scores[place] + weight).to(found.scores.dtype)
        return
    assert source.x is not None and found.x is not None and found.y is not None
    _, own = problem.paired()
    to_x, to_y = pair_gradients(options.metric, source.x[row].to(source.dtype), own, weight)
    found.y[: options.pairs] += to_y
    found.x.add_(segment_sum(to_x, torch.where(weight != 0, row, source.shape[0]), source.shape[0]))


def _forward_fake(
    x: Tensor | None, y: Tensor | None, scores: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    first = scores if x is None else x
    assert first is not None
    if scores is not None:
        rows, columns = scores.shape
    else:
        assert y is not None
        rows, columns = first.shape[0], y.shape[0]
    direction = rest[7]
    pairs = min(rows, columns)
    like = first.new_empty(0, dtype=accumulation(first.dtype))
    by_row, by_column = direction != "y_to_x", direction != "x_to_y"
    return (
        like.new_empty(rows if by_row else 0),
        like.new_empty(columns if by_column else 0),
        like.new_empty(pairs if by_row else 0, dtype=torch.int64),
        like.new_empty(pairs if by_column else 0, dtype=torch.int64),
        like.new_empty(pairs),
    )


register(
    "ranking_loss",
    inputs="Tensor? x, Tensor? y, Tensor? scores, Tensor? negatives, "
    "Tensor? exclude_x, Tensor? exclude_y, Tensor? exclude_negatives",
    options="float margin, str metric, bool hardest, str direction, str backend",
    outputs=("loss_x", "loss_y", "state_x", "state_y", "positive"),
    differentiable=2,
    gradients=("x", "y", "scores"),
    forward=_forward,
    fake=_forward_fake,
    backward=_backward,
)
