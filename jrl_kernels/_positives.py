"""Which pairs are positives: the forms a user may give, and sums over each row's or column's pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks


class Positives(NamedTuple):
    """Either ids (a pair is positive where its ids are equal) or a list of pairs, sorted by row.

    A list is what the kernels prefer: its logits are few, kept in float32, and corrected one by one in the gradient.
    """

    x_ids: Tensor | None = None  # int64 [M]
    y_ids: Tensor | None = None  # int64 [N]
    rows: Tensor | None = None  # int64 [pairs]
    columns: Tensor | None = None  # int64 [pairs]


def parse(op: str, positives: Any, rows: int, columns: int, like: Tensor) -> Positives:
    """The user's `positives` for a [rows, columns] problem on the device of `like`."""
    device = like.device
    if positives is None:
        diagonal = torch.arange(min(rows, columns), device=device)
        return Positives(rows=diagonal, columns=diagonal)
    if isinstance(positives, (tuple, list)):
        if len(positives) != 2:
            raise ValueError(
                f"{op}: positives as ids must be a pair (x_ids, y_ids), got {len(positives)} items"
            )
        return Positives(
            x_ids=_checks.ids(op, "positives[0]", positives[0], rows, "x", like),
            y_ids=_checks.ids(op, "positives[1]", positives[1], columns, "x", like),
        )
    if not isinstance(positives, Tensor):
        raise TypeError(
            f"{op}: positives must be None, an int64 index per row, a pair of int64 ids or a sparse CSR "
            f"boolean matrix, got {_checks.describe(positives)}"
        )
    if positives.layout == torch.sparse_csr:
        return _parse_csr(op, positives, rows, columns, like)
    if positives.layout != torch.strided:
        raise TypeError(
            f"{op}: a sparse positives must be CSR (use .to_sparse_csr()), got {positives.layout}"
        )
    if positives.dim() == 2:
        raise ValueError(
            f"{op}: positives as a dense matrix is not taken, since it costs M x N; pass "
            f"positives.to_sparse_csr(), ids or an index per row; got shape {list(positives.shape)}"
        )
    index = _checks.ids(op, "positives", positives, rows, "x", like)
    _checks.condition(
        ((index >= 0) & (index < columns)).all(),
        f"{op}: positives must hold row indices of y in [0, {columns})",
    )
    return Positives(rows=torch.arange(rows, device=device), columns=index)


def _parse_csr(op: str, positives: Tensor, rows: int, columns: int, like: Tensor) -> Positives:
    if positives.dtype != torch.bool:
        raise TypeError(f"{op}: positives as a sparse matrix must be boolean, got {positives.dtype}")
    if tuple(positives.shape) != (rows, columns):
        raise ValueError(f"{op}: positives must have shape [{rows}, {columns}], got {list(positives.shape)}")
    _checks.same_device(op, "positives", positives, "x", like)
    _checks.condition(
        positives.values().all(),
        f"{op}: every stored entry of a sparse positives must be True, got a stored False",
    )
    offsets = positives.crow_indices().to(torch.int64)
    column = positives.col_indices().to(torch.int64)
    position = torch.arange(column.numel(), device=like.device)
    row = torch.searchsorted(offsets, position, right=True) - 1
    increasing = (column[1:] > column[:-1]) | (row[1:] > row[:-1])
    _checks.condition(
        increasing.all(), f"{op}: the column indices of each row of a sparse positives must increase strictly"
    )
    return Positives(rows=row, columns=column)


def exclusions(
    op: str, exclude: Any, shape: tuple[int, int], negatives: Tensor | None, like: Tensor
) -> tuple[Tensor, ...] | None:
    """The user's `exclude` as int64 ids of the rows, of the columns and, where given, of the negatives."""
    if exclude is None:
        return None
    if isinstance(exclude, Tensor):
        if shape[0] != shape[1]:
            raise ValueError(
                f"{op}: exclude as one tensor needs as many rows as columns; pass (x_ids, y_ids), got {shape[0]} x {shape[1]}"
            )
        exclude = (exclude, exclude)
    if not isinstance(exclude, (tuple, list)) or len(exclude) not in (2, 3):
        raise TypeError(
            f"{op}: exclude must be int64 ids or a pair (x_ids, y_ids), got {_checks.describe(exclude)}"
        )
    lengths = [*shape]
    if len(exclude) == 3:
        if negatives is None:
            raise ValueError(f"{op}: exclude has ids for negatives, but negatives is None")
        lengths.append(negatives.shape[0])
    return tuple(
        _checks.ids(op, f"exclude[{i}]", item, length, "x", like)
        for i, (item, length) in enumerate(zip(exclude, lengths, strict=True))
    )


class Groups(NamedTuple):
    """A list of pairs grouped by one side: `order` sorts the list by it, `offsets` [length + 1] bounds each group."""

    key: Tensor  # int64 [pairs], the side each pair belongs to
    order: Tensor | None  # int64 [pairs], None where the list is in order already
    offsets: Tensor  # int64 [length + 1]

    def counts(self) -> Tensor:
        return self.offsets.diff()

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """Sum, max or min of `values` [pairs] in each group; an empty group gives 0, -inf or inf."""
        values = values if self.order is None else values[self.order]
        empty = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}[how]
        return torch.segment_reduce(values, how, offsets=self.offsets, unsafe=True, initial=empty)

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """log of the sum of exp(values) in each group; an empty group gives -inf."""
        top = self.reduce(values, "max")
        finite = torch.where(top.isinf(), 0.0, top)
        return finite + self.reduce((values - finite[self.key]).exp(), "sum").log()


def group(index: Tensor, length: int, in_order: bool) -> Groups:
    order = None if in_order else torch.argsort(index, stable=True)
    ordered = index if order is None else index[order]
    offsets = torch.searchsorted(ordered, torch.arange(length + 1, device=index.device))
    return Groups(index, order, offsets)


def equal_counts(ids: Tensor, others: Tensor) -> Tensor:
    """For each of `ids`, how many of `others` equal it."""
    ordered = others.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
