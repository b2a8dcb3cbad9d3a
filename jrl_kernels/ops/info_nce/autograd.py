"""torch.ops.jrl.info_nce_forward and its backward: schema, kernels' glue, fake implementations, autograd.

The operators return the losses of every row of each direction; reductions and weights are ordinary differentiable PyTorch
around them. `state` of a direction, [7, length], is: log-sum-exp, positive term, number of positives, and for the statistics
whether the arg-max is a positive, entropy in nats, number of candidates and largest logit. It is of every row, so
that states over
disjoint sets of candidates can be merged (jrl_kernels.distributed); only rows with a positive have a loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import accumulation
from ..._operators import register
from ..._positives import Groups, Positives, equal_counts, group
from ..._sweep import Gradients, Source, Wanted, gradients
from .backends import BACKENDS
from .sweep import Axis, Options, Upstream, merge, of_pairs


class _Problem:
    """The operands of one call, prepared for a backend."""

    def __init__(
        self,
        x: Tensor | None,
        y: Tensor | None,
        scores: Tensor | None,
        scale: Tensor,
        negatives: Tensor | None,
        x_ids: Tensor | None,
        y_ids: Tensor | None,
        pair_rows: Tensor | None,
        pair_columns: Tensor | None,
        exclude_x: Tensor | None,
        exclude_y: Tensor | None,
        exclude_negatives: Tensor | None,
        direction: str,
        multi_positive: str,
        details: bool,
        backend: str,
    ) -> None:
        self.implementation: Any = BACKENDS[backend].load()

        def prepared(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else self.implementation.prepare(tensor)

        def packed(ids: Tensor | None) -> Tensor | None:
            return None if ids is None else ids.contiguous()

        self.source = Source(prepared(x), prepared(y), prepared(scores), scale)
        positives = Positives(packed(x_ids), packed(y_ids), packed(pair_rows), packed(pair_columns))
        self.options = Options(
            positives,
            packed(exclude_x),
            packed(exclude_y),
            direction != "y_to_x",
            direction != "x_to_y",
            multi_positive,
            details,
        )
        self.negatives: tuple[Source, Options] | None = None
        if negatives is not None and self.options.rows:
            extra = packed(exclude_negatives)
            self.negatives = (
                self.source._replace(y=prepared(negatives)),
                Options(
                    Positives(),
                    None if extra is None else self.options.exclude_x,
                    extra,
                    True,
                    False,
                    "mean",
                    details,
                ),
            )

    def groups(self) -> tuple[Groups, Groups] | None:
        """The listed pairs, grouped by row and by column."""
        positives = self.options.positives
        if positives.rows is None or positives.columns is None:
            return None
        rows, columns = self.source.shape
        return group(positives.rows, rows, in_order=True), group(positives.columns, columns, in_order=False)


def _counts(problem: _Problem, groups: tuple[Groups, Groups] | None) -> tuple[Tensor, Tensor]:
    if groups is not None:
        return groups[0].counts(), groups[1].counts()
    positives = problem.options.positives
    assert positives.x_ids is not None and positives.y_ids is not None
    return equal_counts(positives.x_ids, positives.y_ids), equal_counts(positives.y_ids, positives.x_ids)


def _with_pairs(axis: Axis, groups: Groups, others: Tensor, logits: Tensor, options: Options) -> Axis:
    """Adds the listed positives that the sweep left out because their exclude ids are equal; sets the positive term."""
    if options.exclude_x is not None and options.exclude_y is not None:
        assert options.positives.rows is not None and options.positives.columns is not None
        back = options.exclude_x[options.positives.rows] == options.exclude_y[options.positives.columns]
        axis = merge(axis, of_pairs(groups, others, logits, back, options.details))
    how = groups.log_sum_exp(logits) if options.multi_positive == "sum" else groups.reduce(logits, "sum")
    return axis._replace(positive=how)


def _hits(
    argmax: Tensor, ids: Tensor | None, others: Tensor | None, groups: Groups | None, partners: Tensor | None
) -> Tensor:
    """Whether the arg-max of each row is one of its positives."""
    if groups is not None:
        assert partners is not None
        return groups.reduce((argmax[groups.key] == partners).double(), "sum") > 0
    assert ids is not None and others is not None
    if others.numel() == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    inside = (argmax >= 0) & (argmax < others.shape[0])
    return inside & (others[argmax.clamp(0, others.shape[0] - 1)] == ids)


def _finish(axis: Axis, count: Tensor, multi_positive: str, hits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses [length] and state [7, length]; a row without a positive has loss 0."""
    assert axis.positive is not None
    valid = count > 0
    positive = axis.positive if multi_positive == "sum" else axis.positive / count.clamp(min=1)
    loss = torch.where(valid, axis.log_sum_exp - positive, 0.0)
    state = torch.zeros(7, loss.shape[0], dtype=loss.dtype, device=loss.device)
    state[0], state[1], state[2] = axis.log_sum_exp, positive, count
    if hits is not None:
        assert axis.expectation is not None and axis.candidates is not None and axis.maximum is not None
        state[3], state[5], state[6] = hits & valid, axis.candidates, axis.maximum
        # without candidates both are -inf
        state[4] = torch.where(axis.candidates > 0, axis.log_sum_exp - axis.expectation, 0.0)
    return loss, state


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _Problem(*arguments)
    source, options = problem.source, problem.options
    found = problem.implementation.statistics(source, options)
    groups = problem.groups()
    counts = _counts(problem, groups)
    positives = options.positives
    like = source.scale  # in the accumulation dtype
    outputs = []
    for side, axis in enumerate((found.rows, found.columns)):
        if axis is None:
            outputs.append((like.new_empty(0), like.new_empty(7, 0)))
            continue
        ids = (positives.x_ids, positives.y_ids)
        lists = (positives.rows, positives.columns)
        if groups is not None:
            other = lists[1 - side]
            assert other is not None
            axis = _with_pairs(axis, groups[side], other, found.pair_logits, options)
        if side == 0 and problem.negatives is not None:
            extra = problem.implementation.statistics(*problem.negatives).rows
            axis = merge(axis, extra, shift=source.shape[1])
        hits = None
        if options.details:
            assert axis.argmax is not None
            hits = _hits(
                axis.argmax,
                ids[side],
                ids[1 - side],
                None if groups is None else groups[side],
                lists[1 - side],
            )
        outputs.append(_finish(axis, counts[side], options.multi_positive, hits))
    (loss_x, state_x), (loss_y, state_y) = outputs
    pair_logits = like.new_empty(0) if found.pair_logits is None else found.pair_logits
    return loss_x, loss_y, state_x, state_y, pair_logits


class _Side:
    """Upstream gradient of one direction: zero, with a log-sum of +inf, for a row without positives."""

    def __init__(self, grad: Tensor, state: Tensor, options: Options) -> None:
        valid = state[2] > 0
        self.grad = torch.where(valid, grad, 0.0).contiguous()
        self.log_sum_exp = torch.where(valid, state[0], torch.inf)
        self.per_positive = self.grad / state[2].clamp(min=1)
        self.positive_term = torch.where(valid, state[1], torch.inf)
        self.log_of_sum = options.multi_positive == "sum"
        self.positive = self.positive_term if self.log_of_sum else self.per_positive

    def at_pairs(self, index: Tensor, logits: Tensor) -> Tensor:
        """This direction's gradient of the listed pairs' logits."""
        softmax = self.grad[index] * (logits - self.log_sum_exp[index]).exp()
        if self.log_of_sum:
            return softmax - self.grad[index] * (logits - self.positive_term[index]).exp()
        return softmax - self.per_positive[index]


def backward(grad_x: Tensor, grad_y: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """The operator's backward before gradients are cast to their inputs' dtype, for those who add up parts of them."""
    *inputs, state_x, state_y, pair_logits, wanted_flags = arguments[:-4]
    problem = _Problem(*inputs, *arguments[-4:])
    source, options = problem.source, problem.options
    wanted = Wanted(*wanted_flags)
    x = _Side(grad_x, state_x, options) if options.rows else None
    y = _Side(grad_y, state_y, options) if options.columns else None
    positives = options.positives
    pair_gradient = None
    if positives.rows is not None and positives.columns is not None:
        pair_gradient = torch.zeros_like(pair_logits)
        if x is not None:
            pair_gradient += x.at_pairs(positives.rows, pair_logits)
        if y is not None:
            pair_gradient += y.at_pairs(positives.columns, pair_logits)
    by_id = positives.x_ids is not None
    upstream = Upstream(
        None if x is None else x.grad,
        None if x is None else x.log_sum_exp,
        x.positive if x is not None and by_id else None,
        None if y is None else y.grad,
        None if y is None else y.log_sum_exp,
        y.positive if y is not None and by_id else None,
        pair_gradient,
    )
    tile, block = problem.implementation.softmax_gradient(source, options, upstream)
    total = gradients(source, tile, block, wanted, bias=False)
    if problem.negatives is not None and x is not None and (wanted.x or wanted.scale):
        extra_source, extra_options = problem.negatives
        alone = Upstream(x.grad, x.log_sum_exp, None, None, None, None, None)
        tile, block = problem.implementation.softmax_gradient(extra_source, extra_options, alone)
        extra = gradients(extra_source, tile, block, Wanted(wanted.x, False, False, wanted.scale), bias=False)
        total = Gradients(
            None if total.x is None or extra.x is None else total.x + extra.x,
            total.y,
            total.scores,
            None if total.scale is None or extra.scale is None else total.scale + extra.scale,
        )

    return total.x, total.y, total.scores, total.scale


def _forward_fake(
    x: Tensor | None, y: Tensor | None, scores: Tensor | None, scale: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    first = scores if x is None else x
    assert first is not None
    rows = first.shape[0]
    if scores is not None:
        columns = scores.shape[1]
    else:
        assert y is not None
        columns = y.shape[0]
    pair_rows, direction = rest[3], rest[8]
    like = first.new_empty(0, dtype=accumulation(first.dtype))
    rows = 0 if direction == "y_to_x" else rows
    columns = 0 if direction == "x_to_y" else columns
    pairs = 0 if pair_rows is None else pair_rows.shape[0]
    return (
        like.new_empty(rows),
        like.new_empty(columns),
        like.new_empty(7, rows),
        like.new_empty(7, columns),
        like.new_empty(pairs),
    )


register(
    "info_nce",
    inputs="Tensor? x, Tensor? y, Tensor? scores, Tensor scale, Tensor? negatives, Tensor? x_ids, Tensor? y_ids, "
    "Tensor? pair_rows, Tensor? pair_columns, Tensor? exclude_x, Tensor? exclude_y, Tensor? exclude_negatives",
    options="str direction, str multi_positive, bool details, str backend",
    outputs=("loss_x", "loss_y", "state_x", "state_y", "pair_logits"),
    differentiable=2,
    gradients=("x", "y", "scores", "scale"),
    forward=_forward,
    fake=_forward_fake,
    backward=backward,
)
