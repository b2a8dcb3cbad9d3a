"""Heat maps and their scores against values known by hand, brute force and every way to break a tie."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from jrl.data.images import ImageTransform
from jrl.grounding.candidates import ANCHOR_SIDES, anchors, to_view
from jrl.grounding.scores import (
    box_scores,
    cell_ranges,
    heat_maps,
    inside,
    mass_inside,
    pixel_ranges,
    pointing,
    recall,
    tie_tolerance,
    visible,
)

seeds = st.integers(0, 2**31 - 1)


def one_cell(cell: int, grid: tuple[int, int] = (4, 4)) -> Tensor:
    return torch.eye(grid[0] * grid[1], dtype=torch.float64)[cell].reshape(grid)


def bilinear(cells: Tensor, x: float, y: float) -> float:
    """Linear between the centres of the cells; beyond the outermost centres their value."""
    rows, columns = cells.shape
    u, v = min(max(x, 0), columns - 1), min(max(y, 0), rows - 1)
    left, top = min(int(u), columns - 2), min(int(v), rows - 2)
    a, b = u - left, v - top
    upper = (1 - a) * cells[top, left] + a * cells[top, left + 1]
    lower = (1 - a) * cells[top + 1, left] + a * cells[top + 1, left + 1]
    return float((1 - b) * upper + b * lower)


SHIFTS = ((0.0, 0.0), (-0.4375, 0.25))


@pytest.mark.parametrize("shift", SHIFTS)
def test_heat_is_bilinear_between_the_centres_of_the_cells(shift: tuple[float, float]) -> None:
    cells = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heat = heat_maps(torch.stack([cells, 2 * cells]), 15, shift)
    assert heat.shape == (2, 15, 15) and heat.dtype == torch.float64
    for row, column in itertools.product(range(15), range(15)):
        x, y = (column + 0.5) * 5 / 15 - 0.5 - shift[1], (row + 0.5) * 3 / 15 - 0.5 - shift[0]
        expected = bilinear(cells, x, y)
        assert float(heat[0, row, column]) == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(heat[1], 2 * heat[0])
    flat = heat_maps(torch.full((3, 5), 0.25), 16, shift)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25), rtol=0, atol=1e-15)


@pytest.mark.parametrize("shift", SHIFTS)
def test_cells_of_a_box_are_those_whose_centres_it_holds(shift: tuple[float, float]) -> None:
    size = 8
    boxes = torch.tensor(
        [
            [1.0, 2.0, 4.0, 5.0],
            [0.6, 0.4, 2.4, 2.6],
            [-3.0, -3.0, 2.0, 20.0],
            [9.0, 1.0, 12.0, 4.0],
            [0.5, 0.5, 7.5, 1.0],
            [1.0, 1.0, 6.0, 6.0],
        ]
    )
    for grid in ((8, 8), (4, 4), (2, 5)):
        covered = inside(cell_ranges(boxes, grid, size, shift), grid)
        for box, own in zip(boxes.tolist(), covered, strict=True):
            for row, column in itertools.product(range(grid[0]), range(grid[1])):
                x = (column + 0.5 + shift[1]) * size / grid[1]
                y = (row + 0.5 + shift[0]) * size / grid[0]
                assert bool(own[row, column]) == (box[0] <= x <= box[2] and box[1] <= y <= box[3])


def test_a_thin_box_has_the_pixels_in_its_middle_and_one_outside_has_none() -> None:
    boxes = torch.tensor(
        [[3.6, 3.1, 4.2, 6.0], [7.8, 7.8, 8.0, 8.0], [8.0, 1.0, 8.3, 4.0], [-9.0, 1.0, -1.0, 4.0]]
    )
    ranges = pixel_ranges(boxes, 8)
    assert ranges[:2].tolist() == [[3, 6, 3, 4], [7, 8, 7, 8]]
    assert visible(ranges).tolist() == [True, True, False, False]
    assert inside(ranges, (8, 8)).sum(dim=(1, 2)).tolist() == [3, 1, 0, 0]


def test_pointing_counts_a_tie_as_the_share_of_it_that_is_right() -> None:
    truth = one_cell(1) > 0
    assert [float(pointing(one_cell(cell), truth)) for cell in (1, 2)] == [1, 0]
    assert float(pointing(torch.full((4, 4), 1 / 16), truth)) == 1 / 16
    # two cells are highest; rounding does not decide between them, a real difference does
    assert float(pointing(one_cell(1) + one_cell(15) * (1 + 1e-9), truth)) == 0.5
    assert float(pointing(one_cell(1) + one_cell(15) * 1.01, truth)) == 0
    # maps have each a truth of their own
    assert pointing(torch.stack([one_cell(1), one_cell(2)]), torch.stack([truth, ~truth])).tolist() == [1, 1]


def test_mass_inside() -> None:
    heat = torch.zeros(4, 4, dtype=torch.float64)
    heat[0, 0], heat[3, 3] = 3.0, 1.0
    truth = torch.zeros(4, 4, dtype=torch.bool)
    truth[:2] = True
    assert float(mass_inside(heat, truth)) == 0.75
    assert float(mass_inside(torch.ones(4, 4, dtype=torch.float64), truth)) == 0.5
    assert float(mass_inside(heat, ~truth | truth)) == 1.0


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 12))
def test_box_scores_are_those_of_brute_force(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heat = torch.rand(3, size, size, generator=generator, dtype=torch.float64)
    corners = torch.rand(9, 2, 2, generator=generator, dtype=torch.float64) * size
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    boxes = torch.cat([boxes, torch.tensor([[0.0, 0.0, size, size]])])
    covered = inside(pixel_ranges(boxes, size), (size, size))
    # pixels as cells, and cells of their own
    cells = torch.rand(3, 3, 4, generator=generator, dtype=torch.float64)
    held = inside(cell_ranges(boxes, (3, 4), size), (3, 4))
    highest, contrast = (box_scores(heat, heat, boxes, kind) for kind in ("max", "mean"))
    both = box_scores(cells, heat, boxes, "max")
    moved = box_scores(cells, heat, boxes, "max", (-0.4, 0.3))
    held_moved = inside(cell_ranges(boxes, (3, 4), size, (-0.4, 0.3)), (3, 4))
    assert torch.equal(box_scores(cells, heat, boxes, "mean"), contrast)
    for n, k in itertools.product(range(3), range(len(boxes))):
        own, others = heat[n][covered[k]], heat[n][~covered[k]]
        assert float(highest[n, k]) == float(own.max())
        assert float(both[n, k]) == float(torch.cat([own, cells[n][held[k]]]).max())
        assert float(moved[n, k]) == float(torch.cat([own, cells[n][held_moved[k]]]).max())
        expected = float(own.mean() - others.mean()) if len(others) else 0.0
        assert float(contrast[n, k]) == pytest.approx(expected, abs=1e-12)


def test_every_cell_is_as_high_in_a_box_wherever_it_lies() -> None:
    # pixels beside the centres of inner cells would make those of the edge win
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 8.0, 16.0, 16.0], [6.0, 6.0, 16.0, 16.0]])
    for cell in range(16):
        heat = heat_maps(one_cell(cell), 16)[None]
        scores = box_scores(one_cell(cell)[None], heat, boxes, "max")
        row, column = divmod(cell, 4)
        assert (scores[0, :2] == 1).tolist() == [row < 2 and column < 2, row >= 2 and column >= 2]
        # the centres of the cells lie at 2, 6, 10 and 14
        assert bool(scores[0, 2] == 1) == (row >= 1 and column >= 1)


def test_box_scores_of_no_box_and_of_another_kind() -> None:
    heat = torch.ones(2, 4, 4, dtype=torch.float64)
    none = torch.zeros(0, 4)
    scores = box_scores(heat, heat, none, "max")
    assert scores.shape == (2, 0)
    right = torch.zeros(2, 0, dtype=torch.bool)
    assert recall(scores, right, 5, tie_tolerance(heat)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="kind: expected one of max, mean, got 'median'"):
        box_scores(heat, heat, none, "median")


def by_every_order(scores: list[int], right: list[bool], k: int) -> float:
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return sum(any(right[i] for i in order[:k]) for order in orders) / len(orders)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.integers(1, 8))
def test_recall_is_the_mean_over_every_order_of_the_ties(boxes: list[tuple[int, bool]], k: int) -> None:
    scores, right = [score for score, _ in boxes], [is_right for _, is_right in boxes]
    found = recall(
        torch.tensor([scores, scores[::-1]], dtype=torch.float64),
        torch.tensor([right, right[::-1]]),
        k,
        torch.full((2,), 1e-6, dtype=torch.float64),
    )
    assert found.tolist() == pytest.approx([by_every_order(scores, right, k)] * 2, abs=1e-12)


def test_recall_takes_scores_within_the_tolerance_for_equal() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-9, 1.0 - 1e-9, 0.5]], dtype=torch.float64)
    right = torch.tensor([[True, False, False, False]])
    tolerance = torch.tensor([1e-6], dtype=torch.float64)
    assert recall(scores, right, 1, tolerance).tolist() == pytest.approx([1 / 3])
    assert recall(scores, right, 2, tolerance).tolist() == pytest.approx([2 / 3])
    assert recall(scores, right, 3, tolerance).tolist() == [1]
    assert recall(scores, right, 1, tolerance * 0).tolist() == [0]


def test_anchors_cover_the_picture_and_never_leave_it() -> None:
    windows = anchors(64)
    assert windows.shape == (81 + 36 + 16 + 4 + 1, 4)
    assert torch.equal(windows, anchors(64))
    assert float(windows.min()) == 0 and float(windows.max()) == pytest.approx(64)
    assert windows[-1].tolist() == [0, 0, 64, 64]
    sides = (windows[:, 2:] - windows[:, :2]) / 64
    assert sides[:, 0].tolist() == pytest.approx(sides[:, 1].tolist())
    for side in ANCHOR_SIDES:
        starts = sorted({round(x, 6) for x in windows[(sides[:, 0] - side).abs() < 1e-9, 0].tolist()})
        assert starts[0] == 0 and starts[-1] == pytest.approx((1 - side) * 64)
        steps = [b - a for a, b in itertools.pairwise(starts)]
        assert all(step <= side * 32 + 1e-5 for step in steps)
    with pytest.raises(ValueError, match=r"sides: expected shares in \(0, 1\], got 0"):
        anchors(64, [0])


@pytest.mark.parametrize(("width", "height"), [(60, 30), (30, 48), (32, 32)])
def test_boxes_move_with_what_the_transform_shows(width: int, height: int) -> None:
    picture = Image.new("RGB", (width, height), "black")
    box = (width // 2 - 6, height // 2 - 9, width // 2 + 3, height // 2)
    picture.paste((255, 255, 255), box)
    size = 64
    pixels = ImageTransform(size, (0, 0, 0), (1, 1, 1))(picture)[0]
    x0, y0, x1, y1 = to_view([box], width, height, size)[0].tolist()
    rows, columns = (pixels > 0.5).nonzero(as_tuple=True)
    found = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    assert found == pytest.approx([x0, y0, x1, y1], abs=1)
    assert math.isclose((x1 - x0) / (y1 - y0), 1)
