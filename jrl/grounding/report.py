"""The results of a grounding as JSON, Markdown and a table in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from jrl.grounding.evaluate import METRICS, OVERLAP, SYSTEM, Grounding

_HEADINGS = {"pointing": "pointing", "inside": "inside"}


def to_json(found: Grounding) -> dict[str, Any]:
    """Everything that was found, in JSON types."""
    ratio = found.times_constant
    return {
        "phrases": found.phrases,
        "captions": found.captions,
        "candidates": found.candidates,
        "overlap": OVERLAP,
        "grid": list(found.grid),
        "best_constant_cell": list(found.cell),
        "pointing_times_best_constant": ratio if ratio != float("inf") else None,
        "skipped": dict(found.skips.counts),
        "noted": dict(found.skips.notes),
        "scores": found.scores,
    }


def to_markdown(found: Grounding) -> str:
    """A row a pointer, in per cent; the system is set in bold."""
    lines = [f"| | {' | '.join(_headings())} |", f"|---|{'--:|' * len(METRICS)}"]
    for name, cells in _rows(found):
        bold = "**" if name == SYSTEM else ""
        lines.append(f"| {' | '.join(f'{bold}{cell}{bold}' for cell in (name, *cells))} |")
    return "\n".join(lines)


def to_table(found: Grounding, title: str) -> Table:
    """The same for the terminal."""
    # eight columns in eighty letters
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in _headings():
        table.add_column(heading, justify="right", no_wrap=" " not in heading)
    for name, cells in _rows(found):
        table.add_row(name, *cells, style="bold" if name == SYSTEM else None)
    return table


def _headings() -> list[str]:
    # "r5_max" is read "R@5 max"
    return [_HEADINGS.get(name) or f"R@{name[1:].replace('_', ' ')}" for name in METRICS]


def _rows(found: Grounding) -> list[tuple[str, list[str]]]:
    return [
        (name, [f"{100 * values[metric]:.1f}" for metric in METRICS]) for name, values in found.scores.items()
    ]
