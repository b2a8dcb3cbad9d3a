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
from .agreement import Columns, raise_together
from .carriers import carrier, check_form
from .positives import check_positives, rank_positives
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
        TypeError, ValueError: as `jrl_kernels.info_nce`; on every rank, where one rank alone refuses its arguments ValueError on
            the others (see `raise_together`). ValueError on every rank where they disagree in widths, dtypes, options or which
            tensors have gradients. With even=True a rank raises alone.
        NotImplementedError: the ring with backend "reference".
        RuntimeError: no process group, or a rank was lost.

    Gradients: x, y, scale, weights (bias: zero); once differentiable.
    """
    op = "distributed.info_nce"
    with raise_together(x, y, group=group, alone=even):
        _checks.matrix(op, "x", x)
        _checks.matrix(op, "y", y, columns=x.shape[1])
        _checks.same_device(op, "y", y, "x", x)
        if negatives is not None:
            _checks.matrix(op, "negatives", negatives, columns=x.shape[1])
            _checks.same_device(op, "negatives", negatives, "x", x)
            negatives = negatives.detach()
        x, y, negatives = _checks.autocast(x, y, negatives)  # type: ignore[assignment]
        _checks.same_dtype(op, "y", y, "x", x)
        if negatives is not None:
            _checks.same_dtype(op, "negatives", negatives, "x", x)
        if normalize:
            x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
            negatives = None if negatives is None else F.normalize(negatives, dim=1)
        inputs = _Inputs(x, y, None, _checks.scalar(op, "scale", scale, "x", x), negatives)
        call = _Call(
            op, bias, positives, exclude, direction, multi_positive, weights, return_stats, gradients, form, backend
        )  # fmt: skip
        call, columns = _checked(call, inputs, y.shape[0], even)
    ranks = Ranks(op, y, (normalize, *_agreed(call, inputs)), group, even, columns)
    return _loss(call, inputs, ranks)


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
    with raise_together(scores, group=group):
        _checks.matrix(op, "scores", scores)
        inputs = _Inputs(None, None, scores, _checks.scalar(op, "scale", scale, "scores", scores), None)
        own = scores.shape[0] if columns is None else _checks.integer(op, "columns", columns, 0)
        call = _Call(
            op, bias, positives, exclude, direction, multi_positive, weights, return_stats, gradients, "gather", backend
        )  # fmt: skip
        call, wanted = _checked(call, inputs, own, even=False)
        if not wanted.least <= scores.shape[1] <= wanted.most:
            raise ValueError(f"{op}: positives have {wanted} columns, scores have {scores.shape[1]}")
    wanted = Columns.exactly(scores.shape[1])
    ranks = Ranks(op, scores.new_empty(own), _agreed(call, inputs), group, False, wanted)
    return _loss(call, inputs, ranks)


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
    """What a loss is called with besides the tensors that have gradients."""

    op: str
    bias: Any
    positives: Any
    exclude: Any
    direction: str
    multi_positive: str
    weights: Any
    return_stats: bool
    gradients: str
    form: str
    backend: str


def _checked(call: _Call, inputs: _Inputs, columns: int, even: bool) -> tuple[_Call, Columns]:
    """The call with tensors in the place of what was given, and how many columns of all ranks it is made for.

    Args:
        columns: this rank's.
    """
    op, first = call.op, inputs.first
    shape = first.shape[0], columns
    _checks.choice(op, "direction", call.direction, DIRECTIONS)
    _checks.choice(op, "multi_positive", call.multi_positive, ("mean", "sum"))
    _checks.choice(op, "gradients", call.gradients, GRADIENTS)
    backend = _dispatch.select(op, call.backend, "info_nce", first)
    check_form(op, call.form, backend)
    sparse = isinstance(call.positives, Tensor) and call.positives.layout != torch.strided
    if backend == "reference" and (inputs.negatives is not None or sparse):
        raise NotImplementedError(
            f"{op}: backend 'reference' takes neither negatives nor sparse positives, which belong to a rank; "
            "use 'cpu' or 'triton'"
        )
    wanted = check_positives(op, call.positives, shape, first, even)
    weights = call.weights
    if weights is not None:
        if call.positives is not None:
            raise ValueError(
                f"{op}: weights need positives=None, so that a pair's weight is its column's too"
            )
        weights = _checks.vector(op, "weights", weights, shape[0], "x", first).to(inputs.scale.dtype)
    checked = call._replace(
        bias=None if call.bias is None else _checks.scalar(op, "bias", call.bias, "x", first),
        exclude=exclusions(op, call.exclude, shape, inputs.negatives, first) or (),
        weights=weights,
        backend=backend,
    )
    return checked, wanted


def _agreed(call: _Call, inputs: _Inputs) -> tuple[Any, ...]:
    """What decides which collectives follow, so that ranks that differ in it would hang."""
    options = call.direction, call.multi_positive, call.gradients, call.return_stats, call.form, call.backend
    # of what each rank has its own, only the kind
    kinds = type(call.positives).__name__, len(call.exclude[:2]), call.weights is None
    learning = differentiated(inputs.y, inputs.first, inputs.scale)
    if call.backend == "reference":  # which gathers each tensor with its gradient
        learning = tuple(
            name
            for name, tensor in (*inputs._asdict().items(), ("weights", call.weights))
            if differentiated(tensor)
        )
    return (*options, *kinds, *learning)


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


def _loss(call: _Call, inputs: _Inputs, ranks: Ranks) -> Any:
    found = _reference(call, inputs, ranks) if call.backend == "reference" else _fused(call, inputs, ranks)
    loss, stats = found
    if call.bias is not None:
        loss = loss + 0.0 * call.bias
    return (loss, stats) if call.return_stats else loss


def _fused(call: _Call, inputs: _Inputs, ranks: Ranks) -> tuple[Tensor, InfoNCEStatistics | None]:
    first, weights = inputs.first, call.weights
    which = rank_positives(call.op, call.positives, (first.shape[0], ranks.rows[ranks.rank]), ranks, first)
    settings = Settings(
        carrier(call.form, ranks), which, (*call.exclude, None, None, None)[:3], call.direction,
        call.multi_positive, call.return_stats, call.backend,
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
    values = everywhere[:, 0] / count
    # the second term is 0 in all but the gradient of weights, which divide the loss too
    parts = (here[:, 0] - values * here[:, 1]) / count
    factor = ranks.size if call.gradients == "mean" else 1
    loss = global_loss(parts.mean(), values.mean(), factor)
    stats = _statistics(dict(zip(sides, everywhere, strict=True))) if call.return_stats else None
    return loss, stats


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


def _reference(call: _Call, inputs: _Inputs, ranks: Ranks) -> tuple[Tensor, InfoNCEStatistics]:
    """Every rank computes the whole loss of all gathered rows."""
    rows = Ranks(call.op, inputs.first, "rows", ranks.group, even=False)

    def everywhere(ids: Any) -> Any:
        if isinstance(ids, (tuple, list)):
            return (rows.gather(ids[0]), ranks.gather(ids[1])) if ids else None
        return None if ids is None else rows.gather(ids)

    options: dict[str, Any] = {
        "positives": everywhere(call.positives),
        "exclude": everywhere(call.exclude),
        "direction": call.direction,
        "multi_positive": call.multi_positive,
        "weights": None if call.weights is None else gather_rows(call.weights, rows),
        "scale": inputs.scale,
        "return_stats": True,
        "backend": "reference",
    }
    if inputs.scores is not None:
        loss, stats = whole_from_scores(gather_rows(inputs.scores, rows), **options)
    else:
        assert inputs.x is not None and inputs.y is not None
        loss, stats = whole_info_nce(gather_rows(inputs.x, rows), gather_rows(inputs.y, ranks), **options)
    # a row's gradient is added up over ranks that each have the whole of it
    return global_loss(loss, loss.detach(), 1 if call.gradients == "mean" else 1 / ranks.size), stats
