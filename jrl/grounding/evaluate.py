"""Phrase grounding of a run, beside pointers that see no picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jrl.data.images import load_image
from jrl.data.sample import SkipReport
from jrl.downstream.boxes import box_iou
from jrl.downstream.probe import random_twin
from jrl.grounding.attention import WordMaps, attend, grounder
from jrl.grounding.candidates import anchors, seen_square, to_view
from jrl.grounding.examples import Example
from jrl.grounding.scores import (
    BOX_SCORES,
    MIDDLE,
    Shift,
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
from jrl.training.run import Run

SYSTEM, TWIN = "this system", "random weights"
CELL, CENTRE, UNIFORM = "best constant cell", "image centre", "uniform"
KS = (1, 5, 10)
METRICS = ("pointing", "inside", *(f"r{k}_{kind}" for kind in BOX_SCORES for k in KS))
OVERLAP = 0.5
CUT = "phrase after the last token that the run takes"
_CAPTIONS_AT_ONCE = 64


@dataclass
class Grounding:
    """How well phrases were found.

    Attributes:
        scores: METRICS, each in [0, 1], of each pointer.
        phrases, captions: how many were scored.
        candidates: mean number of boxes that were ranked for a phrase.
        grid: rows and columns of the attention.
        cell: row and column of the best constant cell.
        skips: phrases that could not be scored.
    """

    scores: dict[str, dict[str, float]]
    phrases: int
    captions: int
    candidates: float
    grid: tuple[int, int]
    cell: tuple[int, int]
    skips: SkipReport

    @property
    def times_constant(self) -> float:
        """Pointing accuracy as a multiple of the best that points always at the same place; infinite over 0."""
        best = max(self.scores[name]["pointing"] for name in (CELL, CENTRE, UNIFORM))
        own = self.scores[SYSTEM]["pointing"]
        return own / best if best else float("inf")


def ground(
    run: Run,
    examples: Sequence[Example],
    *,
    train: Sequence[Example] | None = None,
    against_random: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Grounding:
    """Score the heat maps of phrases: bilinear interpolation of the most that a token of the phrase attends.

    Args:
        run: the system, its tokenizer and its preprocessing.
        examples: captions with phrases.
        train: captions whose boxes choose the best constant cell; the `examples` themselves when None.
        against_random: also score the same system with random weights.
        seed: of the random weights.
        say: is told of the progress.

    Raises:
        TypeError, ValueError: the system cannot ground words, see `grounder` and `attend`; ValueError also when no
            phrase could be scored.
    """
    systems = {SYSTEM: grounder(run.system)}
    if against_random:
        systems[TWIN] = grounder(random_twin(run.system, seed))
    size = run.transform.size
    windows = anchors(size)
    skips = SkipReport()
    sums: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    shifts: dict[str, Shift] = {}
    grid, cell = (0, 0), (0, 0)
    phrases = captions = boxes = 0
    for start in range(0, len(examples), _CAPTIONS_AT_ONCE):
        batch = examples[start : start + _CAPTIONS_AT_ONCE]
        pictures = [load_image(example.image, name=example.name) for example in batch]
        words = [example.caption for example in batch]
        maps = {name: attend(run, system, pictures, words) for name, system in systems.items()}
        if not constants:
            grid, shift = maps[SYSTEM][0].grid, maps[SYSTEM][0].shift
            constants, cell = _constants(examples if train is None else train, grid, shift, size)
            # the best constant cell is one of the system's own; the other constants are maps of pixels
            shifts = {**dict.fromkeys((*systems, CELL), shift), CENTRE: MIDDLE, UNIFORM: MIDDLE}
        for row, example in enumerate(batch):
            cells, kept = _cells({name: found[row] for name, found in maps.items()}, example, skips)
            if not kept:
                continue
            for name, constant in constants.items():
                cells[name] = constant.expand(len(kept), -1, -1)
            scores, ranked = _score(cells, shifts, example, kept, windows, size)
            for name, values in scores.items():
                sums[name] = sums.get(name, 0) + values
            phrases, captions, boxes = phrases + len(kept), captions + 1, boxes + ranked * len(kept)
        say(f"{start + len(batch)} of {len(examples)} captions")
    skips.raise_if_empty(phrases, "phrases")
    means = {
        name: dict(zip(METRICS, (total / phrases).tolist(), strict=True)) for name, total in sums.items()
    }
    return Grounding(means, phrases, captions, boxes / phrases, grid, cell, skips)


def _cells(
    maps: dict[str, WordMaps], example: Example, skips: SkipReport
) -> tuple[dict[str, Tensor], list[int]]:
    """The maps [P, rows, columns] of the phrases that have a token, for each system, and which phrases these are."""
    kept, found = [], dict[str, list[Tensor]]({name: [] for name in maps})
    for number, phrase in enumerate(example.phrases):
        own = {name: words.phrase(phrase.start, phrase.end) for name, words in maps.items()}
        told = {name: cells for name, cells in own.items() if cells is not None}
        if len(told) < len(own):
            skips.add(CUT, f"{example.name}: {example.caption[phrase.start : phrase.end]!r}")
            continue
        kept.append(number)
        for name, cells in told.items():
            found[name].append(cells)
    return {name: torch.stack(cells) for name, cells in found.items() if cells}, kept


def _score(
    pointers: dict[str, Tensor],
    shifts: dict[str, Shift],
    example: Example,
    kept: list[int],
    windows: Tensor,
    size: int,
) -> tuple[dict[str, Tensor], int]:
    """METRICS summed over the phrases of a caption, for each pointer, and how many boxes were ranked."""
    boxes = to_view(example.candidates, *example.size, size)
    if example.anchors:
        boxes = torch.cat([boxes, windows])
    boxes = boxes[visible(pixel_ranges(boxes, size))]
    truths = [to_view(example.phrases[number].boxes, *example.size, size) for number in kept]
    # an overlap moved by a rounding error must not fall below one half
    right = torch.stack([(box_iou(boxes, truth) >= OVERLAP - 1e-9).any(dim=1) for truth in truths])
    shown = _shown(example, kept, truths, size)
    found = {}
    for name, cells in pointers.items():
        shift = shifts[name]
        heat, tolerance = heat_maps(cells, size, shift), tie_tolerance(cells)
        grid = (cells.shape[1], cells.shape[2])
        held = torch.stack(
            [inside(cell_ranges(truth, grid, size, shift), grid).any(dim=0) for truth in truths]
        )
        values = [pointing(cells, held), mass_inside(heat, shown)]
        for kind in BOX_SCORES:
            given = box_scores(cells, heat, boxes, kind, shift)
            values += [recall(given, right, k, tolerance) for k in KS]
        found[name] = torch.stack(values).sum(dim=1)
    return found, len(boxes)


def _shown(example: Example, kept: list[int], truths: list[Tensor], size: int) -> Tensor:
    """[P, S, S] bool: where the objects of each phrase show; their boxes where no mask tells."""
    pixels = (size, size)
    boxed = [inside(pixel_ranges(truth, size), pixels).any(dim=0) for truth in truths]
    mask = example.mask()
    if mask is None:
        return torch.stack(boxed)
    left, top, side = seen_square(*example.size)
    steps = (np.arange(size) + 0.5) * side / size
    # the mask may be coarser than the picture
    rows = (top + steps) * mask.shape[0] / example.size[1]
    columns = (left + steps) * mask.shape[1] / example.size[0]
    seen = mask[rows.astype(int)][:, columns.astype(int)]
    found = []
    for number, covered in zip(kept, boxed, strict=True):
        ids = example.phrases[number].mask_ids
        found.append(torch.from_numpy(np.isin(seen, ids)) if ids else covered)
    return torch.stack(found)


def _constants(
    examples: Sequence[Example], grid: tuple[int, int], shift: Shift, size: int
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Maps [rows, columns] that are the same for every picture, and the row and column of the best constant cell."""
    right = torch.zeros(grid)
    for example in examples:
        for phrase in example.phrases:
            truth = to_view(phrase.boxes, *example.size, size)
            right += inside(cell_ranges(truth, grid, size, shift), grid).any(dim=0)
    best = int(right.argmax())
    one = torch.zeros(grid)
    one.view(-1)[best] = 1
    away = (torch.arange(size) + 0.5) / size * 2 - 1
    # falls evenly from the middle to nothing at the corners
    centre = 1 - torch.hypot(away[:, None], away[None].expand(size, -1)) / 2**0.5
    uniform = torch.ones(size, size, dtype=torch.float64)
    maps = {CELL: one, CENTRE: centre.double(), UNIFORM: uniform}
    return maps, divmod(best, grid[1])
