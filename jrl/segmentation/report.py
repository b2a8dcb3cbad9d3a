"""Results of a segmentation as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from jrl.segmentation.evaluate import Score
from jrl.segmentation.segment import Segmented

_VALUES = {
    "mean_iou": "mean IoU",
    "foreground_iou": "mean IoU of the objects' pixels",
    "background_iou": "IoU of the background",
    "pixel_accuracy": "pixel accuracy",
}


def picture_json(
    image: str, size: tuple[int, int], files: dict[str, str], found: Segmented
) -> dict[str, Any]:
    """What was found in one picture, in JSON types.

    Args:
        image: where it was read from.
        size: its width and height.
        files: what was written, by kind.
        found: its segmentation.
    """
    return {
        "image": image,
        "width": size[0],
        "height": size[1],
        **files,
        "classes": [asdict(result) for result in found.results],
    }


def picture_table(title: str, found: Segmented) -> Table:
    """A row a class, the largest first."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("class")
    for heading in ("number", "pixels", "score", "highest", "cosine"):
        table.add_column(heading, justify="right")
    for result in sorted(found.results, key=lambda result: (-result.share, result.number)):
        scores = (
            "" if value is None else f"{value:.3f}" for value in (result.score, result.best, result.cosine)
        )
        table.add_row(escape(result.name), str(result.number), f"{100 * result.share:.1f} %", *scores)
    return table


def score_json(found: Score) -> dict[str, Any]:
    """A score in JSON types."""
    return {
        "pictures": found.pictures,
        "skipped": dict(found.skips.counts),
        **found.values,
        "class_iou": dict(zip(found.names, found.class_iou, strict=True)),
    }


def score_markdown(found: Score) -> str:
    """Two tables: the whole, and each class."""
    lines = ["| | % |", "|---|--:|"]
    lines += [f"| {label} | {100 * found.values[name]:.1f} |" for name, label in _VALUES.items()]
    lines += ["", "| class | IoU % |", "|---|--:|"]
    return "\n".join([*lines, *(f"| {name} | {cell} |" for name, cell in _rows(found))])


def score_table(title: str, found: Score) -> Table:
    """The classes for the terminal, the best first, in three columns a line."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left")
    for _ in range(3):
        table.add_column("class")
        table.add_column("IoU %", justify="right")
    rows = sorted(_rows(found), key=lambda row: -float(row[1]) if row[1] != "–" else 1.0)
    height = -(-len(rows) // 3)
    for start in range(height):
        cells: Sequence[str] = [escape(cell) for row in rows[start::height] for cell in row]
        table.add_row(*cells)
    return table


def score_line(found: Score) -> str:
    """The whole in one line."""
    return ", ".join(f"{label} {100 * found.values[name]:.1f} %" for name, label in _VALUES.items())


def _rows(found: Score) -> list[tuple[str, str]]:
    cells = ("–" if value is None else f"{100 * value:.1f}" for value in found.class_iou)
    return list(zip(found.names, cells, strict=True))
