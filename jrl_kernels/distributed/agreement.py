"""What ranks tell each other before anything else, so that all of them raise where one would and none waits for it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Columns(NamedTuple):
    """How many columns of all ranks together a rank's arguments are made for: from `least` to `most`."""

    least: int = 0
    most: int = 2**62

    @staticmethod
    def exactly(count: int) -> Columns:
        return Columns(count, count)

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"at least {self.least}"


ANY = Columns()


class _Row(NamedTuple):
    """What one rank says: one row of a fixed size, so that it cannot hang on what the ranks disagree about."""

    rows: int  # of its tensor, or REFUSED
    dimensions: int = 0
    first: int = 0  # sizes beyond the rows, for messages
    second: int = 0
    third: int = 0
    dtype: int = 0
    rest: int = 0  # a checksum of the whole shape and the options
    least: int = ANY.least
    most: int = ANY.most

    @property
    def shape(self) -> list[int]:
        return [self.first, self.second, self.third][: max(0, self.dimensions - 1)]

    @property
    def named_dtype(self) -> object:
        return DTYPES[self.dtype] if self.dtype >= 0 else "another dtype"


REFUSED = -1


@contextmanager
def raise_together(
    *arguments: Any, group: dist.ProcessGroup | None = None, alone: bool = False
) -> Iterator[None]:
    """Checks of this rank's own arguments: where one of them raises, every rank raises.

        with raise_together(scores, ids):
            if len(ids) != len(scores):
                raise ValueError(...)
        loss = info_nce_from_scores(...)

    Every function of this module first compares sizes and options in one exchange. A rank that raises here takes part in the one
    that the others have come to, and says that it has refused. So nothing within may talk to other ranks, and what all ranks do
    next must be a function of this module. Without several ranks it is as if it were not there.

    Args:
        arguments: what is checked; ranks talk on the device of the first tensor.
        group: the process group; the default one when None.
        alone: nothing is exchanged, and this rank raises alone: where the others come to no such exchange, as with even=True.

    Raises: what is raised within; on the other ranks ValueError, which says which rank refused.
    """
    try:
        yield
    except Exception:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        if several and not alone:
            _exchange(_Row(REFUSED), _device(arguments, group), group)
        raise


def agree(
    op: str, tensor: Tensor, options: Any, columns: Columns, group: dist.ProcessGroup | None
) -> list[int]:
    """The number of rows of every rank's tensor [b, ...].

    Raises:
        ValueError: a rank has refused its arguments, or ranks disagree in the rest of the shape, the dtype or `options`, or the
            rows of all are not as many as a rank's `columns` asks for. The same on every rank.
    """
    first, second, third = (*tensor.shape[1:], 0, 0, 0)[:3]
    dtype = DTYPES.index(tensor.dtype) if tensor.dtype in DTYPES else -1
    rest = zlib.crc32(repr((tuple(tensor.shape[1:]), options)).encode())
    mine = _Row(tensor.shape[0], tensor.dim(), first, second, third, dtype, rest, *columns)
    found = _exchange(mine, tensor.device, group)
    for rank, theirs in enumerate(found):
        if theirs.rows == REFUSED:
            raise ValueError(f"{op}: rank {rank} refused its arguments; its own error says why")
    for rank, theirs in enumerate(found):
        for name, at_first, at_rank in (
            ("dimensions", found[0].dimensions, theirs.dimensions),
            ("shape beyond the rows", found[0].shape, theirs.shape),
            ("dtype", found[0].named_dtype, theirs.named_dtype),
        ):
            if at_first != at_rank:
                raise ValueError(
                    f"{op}: ranks disagree in {name}: rank 0 has {at_first}, rank {rank} has {at_rank}"
                )
        if theirs.rest != found[0].rest:
            raise ValueError(
                f"{op}: ranks 0 and {rank} were called with different options or shapes "
                f"(this rank: {options!r}, {list(tensor.shape)})"
            )
    rows = [row.rows for row in found]
    for rank, theirs in enumerate(found):
        wanted = Columns(theirs.least, theirs.most)
        if not wanted.least <= sum(rows) <= wanted.most:
            raise ValueError(
                f"{op}: scores and positives must have the columns of all ranks, which are {sum(rows)}; "
                f"those of rank {rank} have {wanted}"
            )
    return rows


def _exchange(mine: _Row, device: torch.device, group: dist.ProcessGroup | None) -> list[_Row]:
    return [_Row(*row) for row in gather_equal(torch.tensor([mine], device=device), group).tolist()]


def gather_equal(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows [b, ...] of all ranks, which must have equally many: [W b, ...]."""
    out = tensor.new_empty(dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:])
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, tensor.contiguous(), group=group)
    return out


def _device(arguments: tuple[Any, ...], group: dist.ProcessGroup | None) -> torch.device:
    """Of the first tensor. NCCL takes nothing from a CPU, where a tensor may lie that is refused for just that."""
    device = next((value.device for value in arguments if isinstance(value, Tensor)), torch.device("cpu"))
    return torch.device("cuda") if dist.get_backend(group) == "nccl" and device.type == "cpu" else device
