"""From attention to heat maps, and what a heat map is worth against true boxes; every tie counts as its mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BOX_SCORES = ("max", "mean")
# rows and columns by which the centres of cells lie beyond the middles of their tiles, in cells
Shift = tuple[float, float]
MIDDLE: Shift = (0.0, 0.0)
# float32 attention interpolated in float64: values so close are equal up to rounding
_TIE = 1e-6


def heat_maps(cells: Tensor, size: int, shift: Shift = MIDDLE) -> Tensor:
    """Values at the cells of a grid as pixels, bilinear between the centres of the cells.

    Args:
        cells: [..., rows, columns].
        size: S, side of the picture in pixels.
        shift: of the cells.

    Returns:
        [..., S, S] float64.
    """
    flat = cells.double().reshape(-1, 1, *cells.shape[-2:])
    # grid_sample takes the grid's edges for -1 and 1
    y, x = (
        ((torch.arange(size, dtype=torch.float64) + 0.5) / size - by / count) * 2 - 1
        for count, by in zip(cells.shape[-2:], shift, strict=True)
    )
    at = torch.stack([x.expand(size, size), y[:, None].expand(size, size)], dim=-1)
    pixels = F.grid_sample(
        flat, at.expand(len(flat), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )
    return pixels.reshape(*cells.shape[:-2], size, size)


def cell_ranges(boxes: Tensor, grid: tuple[int, int], size: int, shift: Shift = MIDDLE) -> Tensor:
    """The cells of a grid whose centres lie in each box.

    Args:
        boxes: [K, 4] of x0, y0, x1, y1 in pixels.
        grid: rows and columns, spread over the picture.
        size: S, side of the picture in pixels.
        shift: of the cells.

    Returns:
        [K, 4] int64: first row, row after the last, first column, column after the last; where a box holds no
        centre, a first that is no less than the last.
    """
    scale = torch.tensor([grid[1], grid[0]], dtype=torch.float64) / size
    first = 0.5 + torch.tensor([shift[1], shift[0]], dtype=torch.float64)
    # a rounding error must not move a box off a centre on its edge
    low = torch.ceil(boxes[:, :2].double() * scale - first - 1e-9).clamp(min=0)
    high = torch.minimum(
        torch.floor(boxes[:, 2:].double() * scale - first + 1e-9) + 1, (scale * size).round()
    )
    return torch.stack([low[:, 1], high[:, 1], low[:, 0], high[:, 0]], dim=1).long()


def pixel_ranges(boxes: Tensor, size: int) -> Tensor:
    """The same for pixels as cells; of a box too thin to hold a centre, the pixels in its middle.

    A box outside of the picture still has none.
    """
    ranges = cell_ranges(boxes, (size, size), size)
    for axis, first in ((1, 0), (0, 2)):
        middle = torch.floor((boxes[:, axis].double() + boxes[:, axis + 2].double()) / 2).long()
        thin = (ranges[:, first + 1] <= ranges[:, first]) & (middle >= 0) & (middle < size)
        ranges[:, first] = torch.where(thin, middle, ranges[:, first])
        ranges[:, first + 1] = torch.where(thin, middle + 1, ranges[:, first + 1])
    return ranges


def visible(ranges: Tensor) -> Tensor:
    """[K] bool: whether a box has a cell."""
    return (ranges[:, 1] > ranges[:, 0]) & (ranges[:, 3] > ranges[:, 2])


def inside(ranges: Tensor, grid: tuple[int, int]) -> Tensor:
    """[K, rows, columns] bool: the cells of each box."""
    rows, columns = (
        (torch.arange(count) >= ranges[:, first, None]) & (torch.arange(count) < ranges[:, first + 1, None])
        for count, first in zip(grid, (0, 2), strict=True)
    )
    return rows[:, :, None] & columns[:, None, :]


def peaks(cells: Tensor) -> Tensor:
    """[..., rows, columns] bool: the cells where a map is highest, those within a millionth of it included."""
    return cells >= cells.amax(dim=(-2, -1), keepdim=True) * (1 - _TIE)


def pointing(cells: Tensor, truth: Tensor) -> Tensor:
    """Whether the highest point lies in the truth.

    A bilinear surface is highest at the centre of a cell, so that centre is the point: pixels beside it would fall short
    of it by a share that depends on where the cell lies. Where several cells are highest, the share of them that is
    right: what one of them drawn at random would score.

    Args:
        cells: [..., rows, columns], not negative.
        truth: [..., rows, columns] bool, the cells whose centres are right.

    Returns:
        [...] float64 in [0, 1].
    """
    highest = peaks(cells)
    return (highest & truth).sum(dim=(-2, -1)).double() / highest.sum(dim=(-2, -1))


def mass_inside(heat: Tensor, truth: Tensor) -> Tensor:
    """Σ of the heat in the truth / Σ of the heat.

    Args:
        heat: [..., S, S], not negative, not zero everywhere.
        truth: [..., S, S] bool.

    Returns:
        [...] float64 in [0, 1].
    """
    return (heat * truth).sum(dim=(-2, -1)) / heat.sum(dim=(-2, -1))


def box_scores(cells: Tensor, heat: Tensor, boxes: Tensor, kind: str, shift: Shift = MIDDLE) -> Tensor:
    """What each map gives each box.

    "max": the highest value in the box, at its pixels and at the centres of cells in it. "mean": the mean over its pixels
    less the mean over all others; 0 for a box that fills the picture.

    Args:
        cells: [N, rows, columns].
        heat: [N, S, S] of the same maps.
        boxes: [K, 4] of x0, y0, x1, y1 in pixels, each with a part in the picture.
        kind: "max" or "mean".
        shift: of the cells.

    Returns:
        [N, K] float64.

    Raises:
        ValueError: another `kind`.
    """
    if kind not in BOX_SCORES:
        raise ValueError(f"kind: expected one of {', '.join(BOX_SCORES)}, got {kind!r}")
    if not len(boxes):
        return heat.new_zeros(len(heat), 0)
    size = heat.shape[-1]
    ranges = pixel_ranges(boxes, size)
    if kind == "max":
        rows, columns = cells.shape[1:]
        centres = cell_ranges(boxes, (rows, columns), size, shift)
        return torch.maximum(_highest(heat, ranges), _highest(cells, centres))
    sums = F.pad(heat.cumsum(dim=1).cumsum(dim=2), (1, 0, 1, 0))
    top, bottom, left, right = ranges.unbind(dim=1)
    within = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
    area = ((bottom - top) * (right - left)).double()
    others = size * size - area
    contrast = within / area - (sums[:, -1, -1, None] - within) / others.clamp(min=1)
    return torch.where(others > 0, contrast, torch.zeros_like(contrast))


def _highest(maps: Tensor, ranges: Tensor) -> Tensor:
    # boxes share their rows and columns, so that a few reductions serve them all
    rows, row_of = ranges[:, :2].unique(dim=0, return_inverse=True)
    columns, column_of = ranges[:, 2:].unique(dim=0, return_inverse=True)
    bands = torch.stack([_reduced(maps, 1, *ends) for ends in rows.tolist()], dim=1)
    boxes = torch.stack([_reduced(bands, 2, *ends) for ends in columns.tolist()], dim=2)
    return boxes[:, row_of, column_of]


def _reduced(maps: Tensor, axis: int, first: int, last: int) -> Tensor:
    if last <= first:
        return maps.new_full([n for i, n in enumerate(maps.shape) if i != axis], float("-inf"))
    return maps.narrow(axis, first, last - first).amax(dim=axis)


def recall(scores: Tensor, right: Tensor, k: int, tolerance: Tensor) -> Tensor:
    """Whether one of the k boxes with the highest scores is right.

    Where boxes tie for the last places, the chance that they hold a right one when the tie is broken at random:
    with m places left for g tied boxes of which h are right, and none right above, 1 − C(g − h, m) / C(g, m).

    Args:
        scores: [N, K].
        right: [N, K] bool.
        k: places.
        tolerance: [N] scores this close are equal.

    Returns:
        [N] float64 in [0, 1]; 0 where there is no box.
    """
    count = scores.shape[1]
    if not count:
        return scores.new_zeros(len(scores))
    k = min(k, count)
    last = scores.topk(k, dim=1).values[:, -1:]
    above = scores > last + tolerance[:, None]
    tied = ~above & (scores >= last - tolerance[:, None])
    places = k - above.sum(dim=1)
    left, wrong = tied.sum(dim=1), (tied & ~right).sum(dim=1)
    missed = torch.ones(len(scores), dtype=torch.float64)
    for drawn in range(k):
        chance = (wrong - drawn).clamp(min=0).double() / (left - drawn).clamp(min=1)
        missed = torch.where(drawn < places, missed * chance, missed)
    return torch.where((above & right).any(dim=1), torch.ones_like(missed), 1 - missed)


def tie_tolerance(cells: Tensor) -> Tensor:
    """[N] for maps [N, rows, columns]: differences of box scores that are no more than rounding."""
    return cells.abs().amax(dim=(-2, -1)) * _TIE
