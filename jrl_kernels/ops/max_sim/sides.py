"""What the backends are given: the regions of all images, or the words of all captions, in one packed matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Side(NamedTuple):
    """The items of groups (images or captions): those of group g are rows offsets[g] to offsets[g + 1]."""

    rows: Tensor  # [N, D]
    offsets: Tensor  # int64 [groups + 1]
    mask: Tensor | None  # bool [N], True for items that count
    longest: int  # no group has more items; an upper bound

    @property
    def groups(self) -> int:
        return self.offsets.shape[0] - 1

    def group_of_row(self) -> Tensor:
        """int64 [N]."""
        places = torch.arange(self.rows.shape[0], device=self.offsets.device)
        return torch.searchsorted(self.offsets, places, right=True) - 1

    def counts(self) -> Tensor:
        """How many items of each group count, int64 [groups]."""
        if self.mask is None:
            return self.offsets.diff()
        return torch.nn.functional.pad(self.mask.cumsum(0), (1, 0))[self.offsets].diff()


class Picks(NamedTuple):
    """What the items of one side find on the other: its groups are the rows of `choice`."""

    sums: Tensor  # [groups of the other side, groups of this side], sums of the maxima
    choice: Tensor  # int16 or int32 [groups of the other side, N]: place in its group, -1 where none gets a gradient


def choice_dtype(longest: int) -> torch.dtype:
    return torch.int16 if longest <= torch.iinfo(torch.int16).max else torch.int32
