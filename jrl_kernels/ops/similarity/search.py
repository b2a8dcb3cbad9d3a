"""One sweep over tiles of scores that nobody stores: ranks and the largest k of each row, whatever computes on a tile.

A backend fills a tile in the accumulation dtype and decides by it where rounding cannot matter. How far rounding can have moved
an entry is bounded here; entries closer than that to their threshold are computed again in float64, one pair at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import accumulation
from ..._positives import Positives

METRICS = ("dot", "cosine", "order", "min", "max")
"""In the order of the launchers' numbers; "min" and "max" combine the dot products of two pairs of embeddings."""

EPSILON = 1e-12
# A product of these two is where the numbers between zero and the smallest normal one, which a GPU may flush, no longer matter.
ROW_FLOOR, COLUMN_FLOOR = 2.0**-60, 2.0**-65


class Pairs(NamedTuple):
    """Whose similarities are searched: rows of x [M, D] with rows of y [N, D], and for an agreement rows of a with rows of b."""

    x: Tensor
    y: Tensor
    metric: str
    a: Tensor | None = None
    b: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return accumulation(self.x.dtype)


class Rounding(NamedTuple):
    """An entry t stands for the score t * row_scale * column_scale, to within row_error * column_error + relative |score|."""

    row_scale: Tensor
    column_scale: Tensor
    row_error: Tensor
    column_error: Tensor
    relative: float
    x_norm: Tensor | None  # float64, of a cosine
    y_norm: Tensor | None

    @property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.row_scale, self.column_scale, self.row_error, self.column_error


class Listed(NamedTuple):
    """Positives of each row: columns[starts[i]:ends[i]], increasing."""

    starts: Tensor
    ends: Tensor
    columns: Tensor


def _norms(tensor: Tensor) -> Tensor:
    out = torch.empty(tensor.shape[0], dtype=torch.float64, device=tensor.device)
    # A few at a time: in float64 all of them would weigh more than everything else here.
    rows = max(1, (1 << 19) // max(1, tensor.shape[1]))
    for start in range(0, tensor.shape[0], rows):
        out[start : start + rows] = tensor[start : start + rows].double().square().sum(1).sqrt()
    return out


def rounding(pairs: Pairs) -> Rounding:
    """The bounds of a problem."""
    x, y, dtype = pairs.x, pairs.y, pairs.dtype
    depth = x.shape[1] + (0 if pairs.a is None else pairs.a.shape[1])
    # A sum of D products in any order, fused or not, is within D/2 epsilon |x| |y|; matrix units may truncate what others round.
    unit = (depth + 16) * torch.finfo(dtype).eps
    if x.is_cuda and x.dtype != dtype:
        unit *= 2
    ones = (
        torch.ones(pairs.shape[0], dtype=dtype, device=x.device),
        torch.ones(pairs.shape[1], dtype=dtype, device=x.device),
    )
    if pairs.metric == "order":
        # Every term is positive: the error is relative to the sum.
        error = torch.full_like(ones[0], ROW_FLOOR), torch.full_like(ones[1], depth * COLUMN_FLOOR)
        return Rounding(*ones, *error, unit, None, None)
    x_norm, y_norm = _norms(x), _norms(y)
    if pairs.a is not None and pairs.b is not None:
        # |x_i| |y_j| + |a_i| |b_j| is at most the product of these.
        x_norm, y_norm = torch.hypot(x_norm, _norms(pairs.a)), torch.hypot(y_norm, _norms(pairs.b))
    row_error = (unit * x_norm).clamp(min=ROW_FLOOR)
    column_error = y_norm.clamp(min=depth * COLUMN_FLOOR)
    if pairs.metric != "cosine":
        return Rounding(*ones, row_error.to(dtype), column_error.to(dtype), 0.0, None, None)
    x_norm, y_norm = x_norm.clamp(min=EPSILON), y_norm.clamp(min=EPSILON)
    scales = x_norm.reciprocal().to(dtype), y_norm.reciprocal().to(dtype)
    return Rounding(
        *scales, (row_error / x_norm).to(dtype), (column_error / y_norm).to(dtype), 0.0, x_norm, y_norm
    )


def listed(positives: Positives, rows: int, columns: int) -> Listed:
    """Every form of positives as a range of columns for each row."""
    if positives.x_ids is not None and positives.y_ids is not None:
        ids, order = positives.y_ids.sort(stable=True)
        x_ids = positives.x_ids.contiguous()
        return Listed(torch.searchsorted(ids, x_ids), torch.searchsorted(ids, x_ids, right=True), order)
    assert positives.rows is not None and positives.columns is not None
    row = torch.arange(rows + 1, device=positives.rows.device)
    bounds = torch.searchsorted(positives.rows.contiguous(), row)
    return Listed(bounds[:-1].contiguous(), bounds[1:].contiguous(), positives.columns.contiguous())


def tiles(pairs: Pairs, passes: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Scores in one buffer that every tile reuses, with the first row and column of each."""
    rows, columns = pairs.shape
    height, width = passes.BLOCK
    count = min(height, rows) * min(width, columns)
    buffers = [
        torch.empty(count, dtype=pairs.dtype, device=pairs.x.device)
        for _ in range(1 if pairs.a is None else 2)
    ]
    for r0 in range(0, rows, height):
        r1 = min(r0 + height, rows)
        for c0 in range(0, columns, width):
            c1 = min(c0 + width, columns)
            views = [buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0) for buffer in buffers]
            passes.fill(pairs.x[r0:r1], pairs.y[c0:c1], pairs.metric, views[0])
            if pairs.a is not None and pairs.b is not None:
                passes.fill(pairs.a[r0:r1], pairs.b[c0:c1], pairs.metric, views[1])
                combine = torch.minimum if pairs.metric == "min" else torch.maximum
                combine(views[0], views[1], out=views[0])
            yield views[0], r0, c0


def ranks(pairs: Pairs, positives: Positives, passes: Any) -> Tensor:
    """How many columns of each row are not below the row's best positive, positives aside."""
    bounds, group = rounding(pairs), listed(positives, *pairs.shape)
    best = passes.best(pairs, bounds, group)
    nearest = best.to(pairs.dtype)
    low = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    high = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    counts = torch.zeros(pairs.shape[0], dtype=torch.int64, device=pairs.x.device)
    for tile, r0, c0 in tiles(pairs, passes):
        passes.count(tile, r0, c0, pairs, bounds, group, low, high, best, counts)
    return counts


def topk(pairs: Pairs, k: int, exclude: tuple[Tensor, Tensor] | None, passes: Any) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest scores of each row; pairs with equal exclude ids stay out."""
    bounds = rounding(pairs)
    found = passes.nothing(pairs, k)
    for tile, r0, c0 in tiles(pairs, passes):
        passes.select(tile, r0, c0, pairs, bounds, exclude, found)
    values, indices = passes.finish(pairs, bounds, found)
    return values, indices
