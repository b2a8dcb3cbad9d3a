"""The ranks of a process group that hold parts of one batch, and the collectives the losses need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks
from .agreement import ANY, Columns, agree, gather_equal, raise_together

T = TypeVar("T")


class Ranks:
    """Every rank's number of rows, and this rank's place among them.

    Args:
        op: name of the op, for messages.
        tensor: this rank's rows [b, ...]; ranks must agree in everything but b.
        options: what else they must agree in.
        group: the process group; the default one when None.
        even: every rank has as many rows. Nothing is exchanged then, and nothing compared.
        columns: how many rows of all ranks this rank's other arguments are made for.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a rank is lost.
        ValueError: ranks disagree, or one has refused its arguments (see `raise_together`); every rank raises, before any
            other collective.
    """

    def __init__(
        self,
        op: str,
        tensor: Tensor,
        options: Any,
        group: dist.ProcessGroup | None,
        even: bool,
        columns: Columns = ANY,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{op}: torch.distributed is not initialised; call torch.distributed.init_process_group"
            )
        self.op, self.group = op, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if even:
            self.rows = [tensor.shape[0]] * self.size
        else:
            self.rows = self.run(
                "agreeing on sizes and options", lambda: agree(op, tensor, options, columns, group)
            )
        self.offset, self.total = sum(self.rows[: self.rank]), sum(self.rows)

    def run(self, what: str, collective: Callable[[], T]) -> T:
        """A collective whose failure says what it was."""
        try:
            return collective()
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.op}: {what} failed on rank {self.rank} of {self.size}; "
                f"if another rank died, hung or raised, look there. {error}"
            ) from error

    def _gather_equal(self, tensor: Tensor) -> Tensor:
        return self.run("gathering from all ranks", lambda: gather_equal(tensor, self.group))

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows [b, ...] of all ranks, in the order of ranks: [N, ...]."""
        most = max(self.rows)
        kind = tensor.dtype
        sent = tensor.to(torch.uint8) if kind == torch.bool else tensor
        if min(self.rows) < most:
            sent = torch.cat([sent, sent.new_zeros(most - sent.shape[0], *sent.shape[1:])])
        out = self._gather_equal(sent)
        if min(self.rows) < most:
            out = torch.cat([part[:rows] for part, rows in zip(out.split(most), self.rows, strict=True)])
        return out.to(kind)

    def stack(self, tensor: Tensor) -> Tensor:
        """The same-shaped tensor of all ranks: [W, ...]."""
        return self._gather_equal(tensor[None])

    def slice(self, rank: int) -> slice:
        """Where the rows of `rank` lie among those of all."""
        start = sum(self.rows[:rank])
        return slice(start, start + self.rows[rank])

    def scatter_sum(self, tensor: Tensor) -> Tensor:
        """Sums [N, ...] over the ranks and keeps this rank's rows [b, ...]. Half precision is summed in float32."""
        kind = tensor.dtype
        wide = tensor.to(torch.promote_types(kind, torch.float32))
        most = max(self.rows)
        if min(self.rows) < most:
            padded = wide.new_zeros(self.size, most, *wide.shape[1:])
            for part, rows in zip(padded, wide.split(self.rows), strict=True):
                part[: rows.shape[0]] = rows
            wide = padded.flatten(0, 1)
        out = wide.new_empty(most, *wide.shape[1:])
        scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self.run(
            "adding up gradients over all ranks",
            lambda: scatter(out, wide.contiguous(), group=self.group),
        )
        return out[: self.rows[self.rank]].to(kind)

    def deliver(self, tensor: Tensor) -> Tensor:
        """Of each rank's [N, ...] the rows that belong to this rank: [W, b, ...]."""
        each = tensor[0].numel() if self.total else 0
        here = self.rows[self.rank]
        out = tensor.new_empty(self.size, here, *tensor.shape[1:])
        self.run(
            "handing out what belongs to other ranks",
            lambda: dist.all_to_all_single(
                out.view(-1),
                tensor.contiguous().view(-1),
                [each * here] * self.size,
                [each * rows for rows in self.rows],
                group=self.group,
            ),
        )
        return out

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks; every rank gets the same bits."""
        return self.stack(tensor).sum(0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.scatter_sum(grad), None


def gather_rows(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Rows of all ranks [N, ...], differentiable: a rank's rows get the sum of what all ranks' losses say of them."""
    return _Gather.apply(tensor, ranks)


def gather(tensor: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows of all ranks in their order, for critics and queues of one's own.

    Args:
        tensor: [b, ...], this rank's rows, of any dtype; b may differ between ranks and be 0.
        group: the process group; the default one when None.

    Returns:
        [N, ...] on every rank.

    Raises: as `info_nce` of this module.

    Gradients: tensor, of a floating dtype: the sum of what all ranks' losses say of this rank's rows.
    """
    op = "distributed.gather"
    with raise_together(tensor, group=group):
        if _checks.tensor(op, "tensor", tensor).dim() == 0:
            raise ValueError(f"{op}: tensor must have shape [b, ...], got []")
    differentiable = torch.is_grad_enabled() and tensor.requires_grad
    ranks = Ranks(op, tensor, (str(tensor.dtype), differentiable), group, even=False)
    return gather_rows(tensor, ranks) if differentiable else ranks.gather(tensor)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


def global_loss(part: Tensor, value: Tensor, factor: float) -> Tensor:
    """`value`, the loss of the whole batch, with `factor` times the gradient of `part`, what this rank has of it."""
    return _Loss.apply(part, value, factor)


def mean(values: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean over the rows of all ranks, for losses of one's own: its gradient is made for data parallelism's average.

    Args:
        values: [b], of this rank's rows; b may differ between ranks and be 0.
        group: the process group; the default one when None.

    Returns:
        0-d, the same bits on every rank; 0 without rows.

    Raises: as `info_nce` of this module.

    Gradients: values, times the number of ranks, see `info_nce`.
    """
    op = "distributed.mean"
    with raise_together(values, group=group):
        _checks.shaped(op, "values", values, "b", {})
    differentiable = torch.is_grad_enabled() and values.requires_grad
    ranks = Ranks(op, values, differentiable, group, even=False)
    part = values.sum() / max(ranks.total, 1)
    return global_loss(part, ranks.sum(part.detach()), ranks.size)
