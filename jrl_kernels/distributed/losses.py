"""Contrastive losses over the batches of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _dispatch
from .._positives import exclusions
from ..ops.info_nce import info_nce as whole_info_nce
from ..ops.info_nce import info_nce_from_scores as whole_from_scores
from ..ops.info_nce.op import DIRECTIONS, InfoNCEStatistics, row_losses
from ..ops.info_nce.reference import RowLosses
from .carriers import FORMS, carrier
from .positives import rank_positives
from .ranks import Ranks, gather_rows, global_loss
from .softmax import Losses, Settings

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
    form: str = "gather",
    even: bool = False,
    backend: str = "auto",
) -> Any:
    """`jrl_kernels.info_nce` over the concatenation of all ranks' batches, at the cost of one rank's rows.

    Rank r computes the logits of its own b rows of x with the N rows of y of all ranks, once in the forward and once in the
    backward: 4 products of b x N x D in all, no N x N tensor. Rows meet all their candidates here; of the columns the ranks
    exchange 8 numbers each. The gradient of y is added up over the ranks, each getting its own.

    After data parallelism has *averaged* the gradients over the ranks (DDP, FSDP), they are those of one process with the whole
    batch: what a rank computes is its share times the number of ranks. gradients="sum" leaves that factor out.

    Args:
        x, y: [b, D], this rank's rows; b may differ between ranks and be 0. With positives given, y may be [c, D].
        scale, bias: as in `jrl_kernels.info_nce`, the same on every rank; a learnable scale's gradient is a share too.
        positives: None (row i of x with row i of y of the same rank); a pair of int64 ids ([b], [c]), equal ones positive across
            ranks; int64 [b], a row of the y of all ranks in their order; or sparse CSR [b, N].
        negatives: [Q, D], this rank's queue, for its own rows.
        exclude: int64 ids ([b], [c]) or one [b] for both sides, compared across ranks; a third [Q] for negatives.
        direction, multi_positive, normalize, backend: as in `jrl_kernels.info_nce`.
        weights: [b] weights of the pairs, with positives=None.
        return_stats: also return InfoNCEStatistics of the whole batch.
        group: the process group; the default one when None.
        gradients: "mean" (for gradients that are averaged over ranks) or "sum".
        form: "gather" (every rank holds all N rows of y) or "ring" (they come by in blocks of one rank's rows, the next one
            under way while one is computed; twice the messages, memory O(b D)). The results differ by rounding alone.
        even: every rank has as many rows: then sizes and dtypes are not exchanged, which saves a synchronisation.

    Returns:
        The 0-d loss of the whole batch, the same bits on every rank; with return_stats a tuple.

    Raises:
        TypeError, ValueError: as `jrl_kernels.info_nce`; ValueError on every rank where they disagree in widths,
            dtypes, options, or in which tensors have gradients.
        NotImplementedError: the ring with backend "reference".
        RuntimeError: no process group, or a rank was lost.

    Gradients: x, y, scale; once differentiable.
    """
    op = "distributed.info_nce"
    _checks.matrix(op, "x", x)
    _checks.matrix(op, "y", y, columns=x.shape[1])
    _checks.same_device(op, "y", y, "x", x)
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
    _checks.choice(op, "form", form, FORMS)
    if form == "ring" and backend == "reference":
        raise NotImplementedError(
            f"{op}: form 'ring' needs a fused backend, got 'reference'; use form='gather'"
        )
    factor = _checks.scalar(op, "scale", scale, "x", x)
    inputs = _Inputs(x, y, None, factor, negatives)
    call = _Call(op, positives, exclude, direction, multi_positive, weights, return_stats, gradients, backend)
    ranks = Ranks(op, y, (form, normalize, *_agreed(call, inputs)), group, even)
    return _loss(call, inputs, bias, form, ranks)


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
    columns: int | None = None,
    group: dist.ProcessGroup | None = None,
    gradients: str = "mean",
    backend: str = "auto",
) -> Any:
    """The loss of `info_nce` over scores that a critic has made of this rank's rows with all ranks' columns.

    Args:
        scores: [b, N]: row i of this rank with the gathered columns, as `max_sim` and `word_region_scores` of this module return.
        scale, bias, positives, exclude, direction, multi_positive, weights, return_stats, group, gradients, backend: as in
            `info_nce`.
        columns: how many of the N are this rank's; b when None.

    Returns, Raises: as `info_nce`. Gradients: scores, scale.
    """
    op = "distributed.info_nce_from_scores"
    _checks.matrix(op, "scores", scores)
    backend = _dispatch.select(op, backend, "info_nce", scores)
    inputs = _Inputs(None, None, scores, _checks.scalar(op, "scale", scale, "scores", scores), None)
    call = _Call(op, positives, exclude, direction, multi_positive, weights, return_stats, gradients, backend)
    own = scores.shape[0] if columns is None else _checks.integer(op, "columns", columns, 0)
    ranks = Ranks(op, scores.new_empty(own), _agreed(call, inputs), group, even=False)
    if scores.shape[1] != ranks.total:
        raise ValueError(
            f"{op}: scores must be [{scores.shape[0]}, {ranks.total}], with the columns of all ranks, got {list(scores.shape)}"
        )
    return _loss(call, inputs, bias, "gather", ranks)


class _Inputs(NamedTuple):
    x: Tensor | None  # [b, D], this rank's
    y: Tensor | None  # [c, D]
    scores: Tensor | None  # [b, N]
    scale: Tensor
    negatives: Tensor | None  # [Q, D]

    @property
    def first(self) -> Tensor:
        tensor = self.x if self.scores is None else self.scores
        assert tensor is not None
        return tensor


class _Call(NamedTuple):
    op: str
    positives: Any
    exclude: Any
    direction: str
    multi_positive: str
    weights: Tensor | None
    return_stats: bool
    gradients: str
    backend: str


def _agreed(call: _Call, inputs: _Inputs) -> tuple[Any, ...]:
    """What decides which collectives follow, so that ranks that differ in it would hang."""
    _checks.choice(call.op, "direction", call.direction, DIRECTIONS)
    _checks.choice(call.op, "multi_positive", call.multi_positive, ("mean", "sum"))
    _checks.choice(call.op, "gradients", call.gradients, GRADIENTS)
    # of what each rank has its own, only the kind
    kinds = (type(own).__name__ for own in (call.positives, call.exclude, call.weights))
    options = call.direction, call.multi_positive, call.gradients, call.return_stats, call.backend
    return (*options, *kinds, *differentiated(inputs.y, inputs.first, inputs.scale))


def differentiated(y: Tensor | None, *others: Tensor) -> tuple[str, ...]:
    """Which collectives the backward will have."""
    recorded = torch.is_grad_enabled()
    of_y = recorded and y is not None and y.requires_grad
    return tuple(
        name
        for name, holds in (
            ("gradients", of_y or (recorded and any(other.requires_grad for other in others))),
            ("gradient of y", of_y),
        )
        if holds
    )


def _loss(call: _Call, inputs: _Inputs, bias: float | Tensor | None, form: str, ranks: Ranks) -> Any:
    op, first = call.op, inputs.first
    shape = first.shape[0], ranks.rows[ranks.rank]
    which = rank_positives(op, call.positives, shape, ranks, first)
    exclude = exclusions(op, call.exclude, shape, inputs.negatives, first) or ()
    weights = call.weights
    if weights is not None:
        if call.positives is not None:
            raise ValueError(
                f"{op}: weights need positives=None, so that a pair's weight is its column's too"
            )
        weights = _checks.vector(op, "weights", weights, shape[0], "x", first).to(inputs.scale.dtype)
    if call.backend == "reference":
        return _reference(call, inputs, weights, ranks)
    settings = Settings(
        carrier(form, ranks), which, (*exclude, None, None, None)[:3], call.direction, call.multi_positive,
        call.return_stats, call.backend,
    )  # fmt: skip
    loss_x, loss_y, state_x, state_y = Losses.apply(*inputs, settings)
    sides = {
        name: row_losses(loss, state)
        for name, loss, state, wanted in (
            ("rows", loss_x, state_x, settings.rows),
            ("columns", loss_y, state_y, settings.columns),
        )
        if wanted
    }
    here = torch.stack([_sums(side, weights, call.return_stats) for side in sides.values()])
    everywhere = ranks.sum(here.detach())
    count = torch.where(everywhere[:, 1] == 0, 1.0, everywhere[:, 1])
    parts, values = here[:, 0] / count, everywhere[:, 0] / count
    factor = ranks.size if call.gradients == "mean" else 1
    loss = global_loss(parts.mean(), values.mean(), factor)
    if bias is not None:
        loss = loss + 0.0 * _checks.scalar(op, "bias", bias, "x", first)
    return (loss, _statistics(dict(zip(sides, everywhere, strict=True)))) if call.return_stats else loss


def _sums(side: RowLosses, weights: Tensor | None, details: bool) -> Tensor:
    """Over this rank's rows: loss, weight, and for the statistics accuracy, entropy, bound and rows with a positive."""
    valid = side.valid.to(side.loss.dtype)
    weight = valid if weights is None else valid * weights
    sums = [(side.loss if weights is None else side.loss * weights).sum(), weight.sum()]
    if details:
        ceiling = torch.where(side.valid, side.candidates.clamp(min=1).log(), 0.0)
        bound = ceiling - side.loss
        sums += [side.correct.sum(), side.entropy.sum(), bound.sum(), valid.sum()]
    return torch.stack(sums)


def _statistics(sums: dict[str, Tensor]) -> InfoNCEStatistics:
    def means(side: str) -> Sequence[Tensor | None]:
        return tuple(sums[side][2:5] / sums[side][5].clamp(min=1)) if side in sums else (None, None, None)

    pairs = zip(means("rows"), means("columns"), strict=True)
    return InfoNCEStatistics(*(value for pair in pairs for value in pair))


def _reference(call: _Call, inputs: _Inputs, weights: Tensor | None, ranks: Ranks) -> Any:
    """Every rank computes the whole loss of all gathered rows."""
    op, positives, scores = call.op, call.positives, inputs.scores
    if inputs.negatives is not None or (isinstance(positives, Tensor) and positives.layout != torch.strided):
        raise NotImplementedError(
            f"{op}: backend 'reference' takes neither negatives nor sparse positives, which belong to a rank; "
            "use 'cpu' or 'triton'"
        )
    rows = Ranks(op, inputs.first, "rows", ranks.group, even=False)

    def everywhere(ids: Any) -> Any:
        if isinstance(ids, (tuple, list)):
            return rows.gather(ids[0]), ranks.gather(ids[1])
        return None if ids is None else rows.gather(ids)

    options: dict[str, Any] = {
        "positives": everywhere(positives),
        "exclude": everywhere(call.exclude),
        "direction": call.direction,
        "multi_positive": call.multi_positive,
        "weights": None if weights is None else rows.gather(weights),
        "scale": inputs.scale,
        "return_stats": True,
        "backend": "reference",
    }
    if scores is not None:
        loss, stats = whole_from_scores(gather_rows(scores, rows), **options)
    else:
        assert inputs.x is not None and inputs.y is not None
        loss, stats = whole_info_nce(gather_rows(inputs.x, rows), gather_rows(inputs.y, ranks), **options)
    # a row's gradient is added up over ranks that each have the whole of it
    loss = global_loss(loss, loss.detach(), 1 if call.gradients == "mean" else 1 / ranks.size)
    return (loss, stats) if call.return_stats else loss
