"""The sigmoid loss over the batches of all ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _dispatch
from ..ops.info_nce import sigmoid_contrastive as local_sigmoid_contrastive
from ..ops.info_nce.sigmoid import backward as operator_backward
from .agreement import raise_together
from .carriers import Carrier, carrier, check_form
from .losses import GRADIENTS, differentiated
from .positives import RankPositives, check_positives, rank_positives
from .ranks import Ranks, gather_rows, global_loss


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
    form: str = "gather",
    even: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`jrl_kernels.sigmoid_contrastive` over the concatenation of all ranks' batches: this rank's rows with all columns.

    Source: Zhai et al. 2023, whose chunked form is form="ring".

    Args:
        x, y, scale, bias, positives, normalize, backend: as `info_nce` of this module and `jrl_kernels.sigmoid_contrastive`.
        group, gradients, form, even: as `info_nce` of this module.

    Returns:
        The 0-d loss of the whole batch, the same on every rank.

    Raises: as `info_nce` of this module. Gradients: x, y, scale, bias.
    """
    op = "distributed.sigmoid_contrastive"
    with raise_together(x, y, group=group, alone=even):
        _checks.matrix(op, "x", x)
        _checks.matrix(op, "y", y, columns=x.shape[1])
        _checks.same_device(op, "y", y, "x", x)
        _checks.choice(op, "gradients", gradients, GRADIENTS)
        x, y = _checks.autocast(x, y)  # type: ignore[assignment]
        _checks.same_dtype(op, "y", y, "x", x)
        factor, offset = _checks.scalar(op, "scale", scale, "x", x), _checks.scalar(op, "bias", bias, "x", x)
        backend = _dispatch.select(op, backend, "info_nce", x)
        check_form(op, form, backend)
        shape = x.shape[0], y.shape[0]
        columns = check_positives(op, positives, shape, x, even)
        if normalize:
            x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    agreed = type(positives).__name__, gradients, form, normalize, backend
    ranks = Ranks(op, y, (*agreed, *differentiated(y, x, factor, offset)), group, even, columns)
    which = rank_positives(op, positives, shape, ranks, x)
    if backend == "reference":
        if positives is None:
            positives = which.listed.columns
        elif which.listed.y_ids is not None:
            positives = which.listed.x_ids, ranks.gather(which.listed.y_ids)
        options = {"scale": factor, "bias": offset, "positives": positives, "backend": backend}
        total = local_sigmoid_contrastive(x, gather_rows(y, ranks), **options) * x.shape[0]
    else:
        total = _Sums.apply(x, y, factor, offset, _Settings(carrier(form, ranks), which, backend)).sum()
    everywhere = ranks.sum(torch.stack([total.detach(), total.new_tensor(float(x.shape[0]))]))
    rows = everywhere[1].clamp(min=1)
    return global_loss(total / rows, everywhere[0] / rows, ranks.size if gradients == "mean" else 1)


class _Settings(NamedTuple):
    carrier: Carrier
    positives: RankPositives
    backend: str


class _Sums(torch.autograd.Function):
    """(x, y, scale, bias, settings) -> losses of this rank's rows [b], each a sum over the columns of all ranks."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, y, scale, bias, settings = arguments
        losses = scale.new_zeros(x.shape[0])
        pairs: list[Tensor] = []

        def compute(columns: slice, block: Tensor, y_ids: Tensor | None = None) -> None:
            which = settings.positives.within(columns, settings.carrier.ranks.total, y_ids)
            more, logits = torch.ops.jrl.sigmoid_contrastive_forward(
                x, block, scale, bias, *which, settings.backend
            )
            pairs.append(logits)
            losses.add_(more)

        y_ids = settings.positives.listed.y_ids
        brought = settings.carrier.bring(y, *([] if y_ids is None else [y_ids]))
        settings.carrier.visit(brought, compute)
        ctx.settings, ctx.brought = settings, len(brought)
        ctx.save_for_backward(x, y, scale, bias, *brought, *pairs)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        x, y, scale, bias, *others = ctx.saved_tensors
        brought, pairs = others[: ctx.brought], iter(others[ctx.brought :])
        wanted = [bool(need) for need in ctx.needs_input_grad[:4]]
        operator = _checks.without_autocast(operator_backward)
        total: list[Tensor | None] = [None] * 4

        def compute(columns: slice, block: Tensor, y_ids: Tensor | None = None) -> Tensor | None:
            which = settings.positives.within(columns, settings.carrier.ranks.total, y_ids)
            parts = operator(grad, x, block, scale, bias, *which, next(pairs), wanted, settings.backend)
            for place in (0, 2, 3):
                part, before = parts[place], total[place]
                total[place] = part if before is None or part is None else before.add_(part)
            gradient: Tensor | None = parts[1] if wanted[1] else None
            return gradient

        total[1] = settings.carrier.visit(brought, compute)
        gradients = [
            gradient.to(tensor.dtype) if want and gradient is not None else None
            for gradient, tensor, want in zip(total, (x, y, scale, bias), wanted, strict=True)
        ]
        return (*gradients, None)
