"""A picture a task: test scenes with the truth and what was said of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jrl.data.images import load_image
from jrl.downstream.probe import Outcome
from jrl.downstream.retrieval import Retrieval
from jrl.downstream.scenes import ScenePart
from jrl.training.files import write_atomically

_EXAMPLES, _QUERIES = 8, 4


def save_picture(outcome: Outcome, part: ScenePart, path: str | Path) -> None:
    """Draw eight examples spread over the test part, or four queries of a retrieval and the pictures found.

    Args:
        outcome: of one task.
        part: the test part.
        path: of the PNG.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    if isinstance(outcome.result, Retrieval):
        figure = _queries(outcome.result, part)
    else:
        figure = _examples(outcome, part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())


def _examples(outcome: Outcome, part: ScenePart) -> Figure:
    assert outcome.task is not None and not isinstance(outcome.result, Retrieval)
    examples = outcome.result.examples
    rows = _spread(len(examples["image"]), _EXAMPLES)
    columns = min(len(rows), 2 if outcome.task.panels > 1 else 4)
    height = -(-len(rows) // columns)
    wide = 2.6 * columns * max(1, outcome.task.panels * 2 / 3)
    figure = Figure(figsize=(wide, (3.4 if outcome.task.panels == 1 else 2.0) * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("lightgrey")
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(panels, rows, strict=False):
        picture = _picture(part, int(examples["image"][row]))
        outcome.task.draw(axes, picture, outcome.result.predictions, examples, row)
    return figure


def _queries(found: Retrieval, part: ScenePart) -> Figure:
    rows, columns = _spread(len(part), _QUERIES), found.found.shape[1]
    figure = Figure(figsize=(1.9 * columns, 2.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, panels, strict=True):
        # a long caption runs over the pictures to its right, rather than widen the first
        line[0].set_title(found.captions[row], fontsize=7, loc="left").set_in_layout(False)
        for axes, place in zip(line, found.found[row].tolist(), strict=True):
            axes.imshow(_picture(part, place))
            axes.set_xticks([])
            axes.set_yticks([])
            right = place == row
            axes.spines[:].set(color="tab:green" if right else "lightgrey", linewidth=3 if right else 1)
    return figure


def _picture(part: ScenePart, row: int) -> np.ndarray:
    sample = part.samples[row]
    return np.asarray(load_image(sample.image, name=sample.key), dtype=np.float32) / 255


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, wanted))})
