"""Positives among this rank's rows and the columns of all ranks, as one block of columns after another needs them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._positives import Positives, parse
from .agreement import ANY, Columns
from .ranks import Ranks


class RankPositives(NamedTuple):
    """`listed` has its columns among those of all ranks; ids of columns are this rank's."""

    listed: Positives
    own: slice | None  # this rank's columns, where all listed pairs lie; None where they lie anywhere

    def within(self, columns: slice, total: int, y_ids: Tensor | None) -> Positives:
        """Those of a block of columns, which are counted from its first; `y_ids` are the ids of its columns."""
        rows, places = self.listed.rows, self.listed.columns
        if rows is None or places is None:
            return Positives(x_ids=self.listed.x_ids, y_ids=y_ids)
        if columns == slice(0, total):
            return self.listed
        if self.own is not None:
            # without looking at the pairs, which would stall an accelerator
            count = len(rows) if columns == self.own else 0
            return Positives(rows=rows[:count], columns=places[:count] - columns.start)
        here = (places >= columns.start) & (places < columns.stop)
        return Positives(rows=rows[here], columns=places[here] - columns.start)


def check_positives(op: str, positives: Any, shape: tuple[int, int], like: Tensor, even: bool) -> Columns:
    """What one rank can say of the user's `positives` of its own [rows, columns].

    Args:
        even: ranks do not agree, so all but the default is left to `rank_positives`, which reads nothing from a GPU.

    Returns:
        How many columns of all ranks they are made for.

    Raises:
        TypeError, ValueError: as `info_nce`; ValueError also where the default positives find no partner of the same rank.
    """
    rows, columns = shape
    if positives is None:
        if rows != columns:
            raise ValueError(f"{op}: x and y must have the same number of rows, got {rows} and {columns}")
        return ANY
    if even:
        return ANY
    if isinstance(positives, (tuple, list)):
        parse(op, positives, rows, columns, like)
        return ANY
    wanted = ANY
    if isinstance(positives, Tensor) and positives.layout == torch.sparse_csr:
        wanted = Columns.exactly(positives.shape[-1])
    elif isinstance(positives, Tensor) and positives.dtype == torch.int64 and positives.numel():
        wanted = Columns(max(0, int(positives.max()) + 1))
    parse(op, positives, rows, wanted.least, like)
    return wanted


def rank_positives(
    op: str, positives: Any, shape: tuple[int, int], ranks: Ranks, like: Tensor
) -> RankPositives:
    """The user's `positives` of this rank's [rows, columns].

    Raises:
        TypeError, ValueError: as `info_nce`, where ranks have not agreed on `check_positives`.
    """
    rows, columns = shape
    if positives is None:
        row = torch.arange(rows, device=like.device)
        return RankPositives(Positives(rows=row, columns=row + ranks.offset), ranks.slice(ranks.rank))
    by_id = isinstance(positives, (tuple, list))
    return RankPositives(parse(op, positives, rows, columns if by_id else ranks.total, like), None)
