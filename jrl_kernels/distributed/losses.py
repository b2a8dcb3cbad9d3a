"""Contrastive losses over the batches of all ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _dispatch
from .._positives import Positives, exclusions, parse
from ..ops.info_nce import info_nce as whole_info_nce
from ..ops.info_nce import info_nce_from_scores as whole_from_scores
from ..ops.info_nce import sigmoid_contrastive as local_sigmoid_contrastive
from ..ops.info_nce.op import DIRECTIONS, InfoNCEStatistics, row_losses
from ..ops.info_nce.reference import RowLosses
from .ranks import Ranks, gather_rows, global_loss

GRADIENTS = ("mean", "sum")


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
    weights: Tensor | None = None,
    normalize: bool = False,
    return_stats: bool = False,
    group: dist.ProcessGroup | None = None,
    gradients: str = "mean",
    even: bool = False,
    backend: str = "auto",
) -> Any:
    """`jrl_kernels.info_nce` over the concatenation of all ranks' batches, at the cost of one rank's rows.

    Rank r computes the logits of its own b rows of x with the N gathered rows of y, once in the forward and once in the backward:
    4 products of b x N x D in all, no N x N tensor. Rows have all their candidates at hand; of the columns the ranks exchange
    7 numbers each. The gradient of the gathered rows is added up over the ranks, each getting its own.

    After data parallelism has *averaged* the gradients over the ranks (DDP, FSDP), they are those of one process with the whole
    batch: what a rank computes is its share times the number of ranks. gradients="sum" leaves that factor out.

    Args:
        x, y: [b, D], this rank's rows; b may differ between ranks and be 0.
        scale, bias: as in `jrl_kernels.info_nce`, the same on every rank; a learnable scale's gradient is a share too.
        positives: None (row i of x with row i of y of the same rank); a pair of int64 ids ([b], [b]), equal ones positive across
            ranks; int64 [b], a row of the gathered y; or sparse CSR [b, N].
        negatives: [Q, D], this rank's queue, for its own rows.
        exclude: int64 ids ([b], [b]) or one [b] for both sides, compared across ranks; a third [Q] for negatives.
        direction, multi_positive, normalize, backend: as in `jrl_kernels.info_nce`.
        weights: [b] weights of the pairs, with positives=None.
        return_stats: also return InfoNCEStatistics of the whole batch.
        group: the process group; the default one when None.
        gradients: "mean" (for gradients that are averaged over ranks) or "sum".
        even: every rank has b rows: then sizes and dtypes are not exchanged, which saves a synchronisation.

    Returns:
        The 0-d loss of the whole batch, the same bits on every rank; with return_stats a tuple.

    Raises:
        TypeError, ValueError: as `jrl_kernels.info_nce`; ValueError on every rank where they disagree in widths,
        dtypes or options.
        RuntimeError: no process group, or a rank was lost.

    Gradients: x, y, scale; once differentiable.
    """
    op = "distributed.info_nce"
    _checks.matrix(op, "x", x)
    _checks.matrix(op, "y", y, columns=x.shape[1])
    _checks.same_device(op, "y", y, "x", x)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{op}: x and y must have the same number of rows, got {x.shape[0]} and {y.shape[0]}"
        )
    if negatives is not None:
        _checks.matrix(op, "negatives", negatives, columns=x.shape[1])
        negatives = negatives.detach()
    x, y, negatives = _checks.autocast(x, y, negatives)  # type: ignore[assignment]
    _checks.same_dtype(op, "y", y, "x", x)
    if negatives is not None:
        _checks.same_dtype(op, "negatives", negatives, "x", x)
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        negatives = None if negatives is None else F.normalize(negatives, dim=1)
    backend = _dispatch.select(op, backend, "info_nce", x)
    kinds = positives, exclude, weights
    options = _options(op, direction, multi_positive, gradients, kinds, normalize, return_stats, backend)
    ranks = Ranks(op, x, options, group, even)
    problem = _Problem(x, gather_rows(y, ranks), None, _checks.scalar(op, "scale", scale, "x", x), negatives)
    return _loss(
        op, problem, bias, ranks, positives, exclude, direction, multi_positive, weights, return_stats, gradients, backend
    )  # fmt: skip


def info_nce_from_scores(
    scores: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    positives: Any = None,
    exclude: Any = None,
    direction: str = "both",
    multi_positive: str = "mean",
    weights: Tensor | None = None,
    return_stats: bool = False,
    group: dist.ProcessGroup | None = None,
    gradients: str = "mean",
    backend: str = "auto",
) -> Any:
    """The loss of `info_nce` over scores that a critic has made of this rank's rows with all ranks' columns.

    Args:
        scores: [b, N]: row i of this rank with the gathered columns, as `max_sim` and `word_region_scores` of this module return.
        scale, bias, positives, exclude, direction, multi_positive, weights, return_stats, group, gradients, backend: as in
            `info_nce`; b columns of the N are this rank's.

    Returns, Raises: as `info_nce`. Gradients: scores, scale.
    """
    op = "distributed.info_nce_from_scores"
    _checks.matrix(op, "scores", scores)
    backend = _dispatch.select(op, backend, "info_nce", scores)
    kinds = positives, exclude, weights
    options = _options(op, direction, multi_positive, gradients, kinds, return_stats, backend)
    ranks = Ranks(op, scores, options, group, even=False)
    if scores.shape[1] != ranks.total:
        raise ValueError(
            f"{op}: scores must be [{scores.shape[0]}, {ranks.total}], a column for each row of all ranks, "
            f"got {list(scores.shape)}"
        )
    problem = _Problem(None, None, scores, _checks.scalar(op, "scale", scale, "scores", scores), None)
    return _loss(
        op, problem, bias, ranks, positives, exclude, direction, multi_positive, weights, return_stats, gradients, backend
    )  # fmt: skip


class _Problem(NamedTuple):
    x: Tensor | None  # [b, D], this rank's
    y: Tensor | None  # [N, D], of all ranks
    scores: Tensor | None  # [b, N]
    scale: Tensor
    negatives: Tensor | None  # [Q, D]


def _options(
    op: str, direction: str, multi_positive: str, gradients: str, kinds: tuple[Any, ...], *others: Any
) -> tuple[Any, ...]:
    """What decides which collectives follow, so that ranks that differ in it would hang."""
    _checks.choice(op, "direction", direction, DIRECTIONS)
    _checks.choice(op, "multi_positive", multi_positive, ("mean", "sum"))
    _checks.choice(op, "gradients", gradients, GRADIENTS)
    # of what each rank has its own, only the kind
    return direction, multi_positive, gradients, *(type(kind).__name__ for kind in kinds), *others


def _loss(
    op: str,
    problem: _Problem,
    bias: float | Tensor | None,
    ranks: Ranks,
    positives: Any,
    exclude: Any,
    direction: str,
    multi_positive: str,
    weights: Tensor | None,
    return_stats: bool,
    gradients: str,
    backend: str,
) -> Any:
    first = problem.scores if problem.x is None else problem.x
    assert first is not None
    own = first.shape[0]
    which = _positives(op, positives, ranks, own, first)
    excluded = _exclusions(op, exclude, ranks, own, problem.negatives, first)
    column_weights = None
    if weights is not None:
        if positives is not None:
            raise ValueError(
                f"{op}: weights need positives=None, so that a pair's weight is its column's too"
            )
        weights = _checks.vector(op, "weights", weights, own, "x", first).to(problem.scale.dtype)
        column_weights = ranks.gather(weights)
    if backend == "reference":
        return _reference(
            op, problem, ranks, positives, exclude, direction, multi_positive, column_weights, return_stats, gradients
        )  # fmt: skip
    loss_x, loss_y, state_x, state_y = _Losses.apply(
        *problem, *which, *excluded, direction, multi_positive, return_stats, backend, ranks
    )
    rows = None if direction == "y_to_x" else row_losses(loss_x, state_x)
    columns = None if direction == "x_to_y" else row_losses(loss_y, state_y)
    parts, values = [], []
    if rows is not None:
        total, count = _weighed(rows, weights)
        everywhere = ranks.sum(torch.stack([total.detach(), count]))
        count = torch.where(everywhere[1] == 0, 1.0, everywhere[1])
        parts.append(total / count)
        values.append(everywhere[0] / count)
    if columns is not None:
        total, count = _weighed(columns, column_weights)
        # every rank holds the losses of all columns, and the gradient of its own rows' share of them
        mean = total / torch.where(count == 0, 1.0, count)
        parts.append(mean)
        values.append(mean.detach())
    factor = ranks.size if gradients == "mean" else 1
    loss = global_loss(torch.stack(parts).mean(), torch.stack(values).mean(), factor)
    if bias is not None:
        loss = loss + 0.0 * _checks.scalar(op, "bias", bias, "x", first)
    return (loss, _statistics(rows, columns, ranks)) if return_stats else loss


def _positives(op: str, positives: Any, ranks: Ranks, own: int, like: Tensor) -> Positives:
    """The positives among this rank's rows and all columns."""
    if positives is None:
        row = torch.arange(own, device=like.device)
        return Positives(rows=row, columns=row + ranks.offset)
    if isinstance(positives, (tuple, list)) and len(positives) == 2:
        local = parse(op, positives, own, own, like)
        assert local.y_ids is not None
        return local._replace(y_ids=ranks.gather(local.y_ids))
    return parse(op, positives, own, ranks.total, like)


def _exclusions(
    op: str, exclude: Any, ranks: Ranks, own: int, negatives: Tensor | None, like: Tensor
) -> tuple[Tensor | None, ...]:
    local = exclusions(op, exclude, (own, own), negatives, like)
    if local is None:
        return None, None, None
    return (local[0], ranks.gather(local[1]), *local[2:], None)[:3]


def _reference(
    op: str,
    problem: _Problem,
    ranks: Ranks,
    positives: Any,
    exclude: Any,
    direction: str,
    multi_positive: str,
    weights: Tensor | None,
    return_stats: bool,
    gradients: str,
) -> Any:
    """Every rank computes the whole loss of all gathered rows."""

    def everywhere(ids: Any) -> Any:
        if isinstance(ids, (tuple, list)):
            return tuple(ranks.gather(part) for part in ids)
        return None if ids is None else ranks.gather(ids)

    if problem.negatives is not None or (isinstance(positives, Tensor) and positives.layout != torch.strided):
        raise NotImplementedError(
            f"{op}: backend 'reference' takes neither negatives nor sparse positives, which belong to a rank; "
            "use 'cpu' or 'triton'"
        )
    options: dict[str, Any] = {
        "positives": everywhere(positives),
        "exclude": everywhere(exclude),
        "direction": direction,
        "multi_positive": multi_positive,
        "weights": weights,
        "scale": problem.scale,
        "return_stats": True,
        "backend": "reference",
    }
    if problem.scores is not None:
        loss, stats = whole_from_scores(gather_rows(problem.scores, ranks), **options)
    else:
        assert problem.x is not None and problem.y is not None
        loss, stats = whole_info_nce(gather_rows(problem.x, ranks), problem.y, **options)
    # a row's gradient is added up over ranks that each have the whole of it
    loss = global_loss(loss, loss.detach(), 1 if gradients == "mean" else 1 / ranks.size)
    return (loss, stats) if return_stats else loss


class _Losses(torch.autograd.Function):
    """Losses of this rank's rows and of all columns; the backward is of this rank's rows of the logits.

    It calls the operators of `jrl_kernels.info_nce` on a rectangle, [b, D] x [N, D], and between forward and
    backward replaces the
    columns' sums over this rank's rows by the sums over all rows.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, direction, multi_positive, details, backend, ranks = arguments
        options = direction, multi_positive, details, backend
        loss_x, loss_y, state_x, state_y, pairs = torch.ops.jrl.info_nce_forward(*inputs, *options)
        if direction != "x_to_y":
            state_y = merge_states(ranks.stack(state_y), multi_positive)
            loss_y = torch.where(state_y[2] > 0, state_y[0] - state_y[1], 0.0)
        ctx.options = options
        ctx.save_for_backward(*inputs, state_x, state_y, pairs)
        ctx.mark_non_differentiable(state_x, state_y)
        return loss_x, loss_y, state_x, state_y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        wanted = [bool(needs[place]) for place in range(4)]
        found = torch.ops.jrl.info_nce_backward(*grads[:2], *ctx.saved_tensors, wanted, *ctx.options)
        kept = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
        return (*kept, *(None,) * (len(needs) - 4))


def merge_states(states: Tensor, multi_positive: str) -> Tensor:
    """The state [7, N] of columns over disjoint sets of rows [W, 7, N]; see `ops.info_nce.autograd`."""
    sums, positive, count, correct, entropy, candidates, maximum = states.unbind(1)
    total, counts = sums.logsumexp(0), count.sum(0)
    if multi_positive == "sum":
        term = torch.where(count > 0, positive, -torch.inf).logsumexp(0)
    else:
        term = (positive * count).sum(0) / counts.clamp(min=1)
    term = torch.where(counts > 0, term, 0.0)
    # entropy = log-sum-exp - expectation of the logits, and expectations add up by their share of the sum
    some = candidates > 0
    share = torch.where(some, (sums - total).exp(), 0.0)
    expectation = (share * torch.where(some, sums - entropy, 0.0)).sum(0)
    # the first of equal maxima, as in one process
    best = torch.where(some, maximum, -torch.inf).argmax(0, keepdim=True)
    return torch.stack(
        [
            total,
            term,
            counts,
            correct.gather(0, best)[0],
            torch.where(candidates.sum(0) > 0, total - expectation, 0.0),
            candidates.sum(0),
            maximum.amax(0),
        ]
    )


def _weighed(side: RowLosses, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the losses and of the weights of the rows that have one."""
    share = side.valid.to(side.loss.dtype)
    if weights is None:
        return side.loss.sum(), share.sum()
    return (side.loss * weights).sum(), (share * weights).sum()


def _statistics(rows: RowLosses | None, columns: RowLosses | None, ranks: Ranks) -> InfoNCEStatistics:
    def means(side: RowLosses | None, partial: bool) -> tuple[Tensor | None, ...]:
        if side is None:
            return None, None, None
        ceiling = torch.where(side.valid, side.candidates.clamp(min=1).log(), 0.0)
        sums = torch.stack(
            [
                side.correct.sum(),
                side.entropy.sum(),
                (ceiling - side.loss.detach()).sum(),
                side.valid.sum().to(ceiling.dtype),
            ]
        )
        sums = ranks.sum(sums) if partial else sums
        return tuple(sums[:3] / sums[3].clamp(min=1))

    accuracy_x, entropy_x, bound_x = means(rows, partial=True)
    accuracy_y, entropy_y, bound_y = means(columns, partial=False)
    return InfoNCEStatistics(accuracy_x, accuracy_y, entropy_x, entropy_y, bound_x, bound_y)


def sigmoid_contrastive(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    positives: Any = None,
    normalize: bool = False,
    group: dist.ProcessGroup | None = None,
    gradients: str = "mean",
    even: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`jrl_kernels.sigmoid_contrastive` over the concatenation of all ranks' batches: this rank's rows with all columns.

    Args:
        x, y, scale, bias, positives, normalize, backend: as `info_nce` of this module and `jrl_kernels.sigmoid_contrastive`.
        group, gradients, even: as `info_nce` of this module.

    Returns:
        The 0-d loss of the whole batch, the same on every rank.

    Raises: as `info_nce` of this module. Gradients: x, y, scale, bias.
    """
    op = "distributed.sigmoid_contrastive"
    _checks.matrix(op, "x", x)
    _checks.matrix(op, "y", y, columns=x.shape[1])
    _checks.choice(op, "gradients", gradients, GRADIENTS)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{op}: x and y must have the same number of rows, got {x.shape[0]} and {y.shape[0]}"
        )
    x, y = _checks.autocast(x, y)  # type: ignore[assignment]
    ranks = Ranks(op, x, (type(positives).__name__, gradients, normalize), group, even)
    if positives is None:
        positives = torch.arange(x.shape[0], device=x.device) + ranks.offset
    elif isinstance(positives, (tuple, list)) and len(positives) == 2:
        positives = positives[0], ranks.gather(positives[1])
    mean = local_sigmoid_contrastive(
        x,
        gather_rows(y, ranks),
        scale=scale,
        bias=bias,
        positives=positives,
        normalize=normalize,
        backend=backend,
    )
    part = mean * x.shape[0] / max(ranks.total, 1)
    return global_loss(part, ranks.sum(part.detach()), ranks.size if gradients == "mean" else 1)
