"""The results of a probe as JSON, Markdown and a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from jrl.downstream.fit import Result
from jrl.downstream.probe import Outcome

_HEADINGS = ("task", "score", "this encoder", "random weights", "without the picture")


def to_json(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Scores and training of each task, in JSON types."""
    found: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        found[name] = {
            "metric": outcome.metric,
            "scores": outcome.scores,
            "random": outcome.random,
            "baseline": outcome.baseline,
        }
        if isinstance(outcome.result, Result):
            found[name]["training"] = {
                "parameters": sum(weight.numel() for weight in outcome.result.head.parameters()),
                "epochs": len(outcome.result.losses),
                "best_epoch": outcome.result.best_epoch,
                "seconds": outcome.result.seconds,
                "train_loss": [train for train, _ in outcome.result.losses],
                "val_loss": [val for _, val in outcome.result.losses],
            }
    return found


def to_markdown(outcomes: Mapping[str, Outcome]) -> str:
    """A table, one row a score, in per cent; the score that stands for a task is set in bold."""
    rows = _rows(outcomes)
    headings = [heading for heading, kept in zip(_HEADINGS, _kept(outcomes), strict=True) if kept]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * 2}{'--:|' * (len(headings) - 2)}"]
    lines += [
        f"| {' | '.join(f'**{cell}**' if stands and cell else cell for cell in cells)} |"
        for stands, cells in rows
    ]
    return "\n".join(lines)


def to_table(outcomes: Mapping[str, Outcome], title: str) -> Table:
    """The same for the terminal."""
    table = Table(title=title)
    for heading, kept in zip(_HEADINGS, _kept(outcomes), strict=True):
        if kept:
            words = heading in ("task", "score")
            table.add_column(heading, justify="left" if words else "right", no_wrap=words)
    for stands, cells in _rows(outcomes):
        table.add_row(*cells, style="bold" if stands else None)
    return table


def _kept(outcomes: Mapping[str, Outcome]) -> tuple[bool, ...]:
    twins = any(outcome.random is not None for outcome in outcomes.values())
    return True, True, True, twins, True


def _rows(outcomes: Mapping[str, Outcome]) -> list[tuple[bool, list[str]]]:
    rows = []
    for name, outcome in outcomes.items():
        for score, value in outcome.scores.items():
            stands = score == outcome.metric
            twin = [] if outcome.random is None else [outcome.random[score]]
            numbers = [f"{100 * number:.1f}" for number in (value, *twin, outcome.baseline[score])]
            rows.append((stands, [name if stands else "", score.replace("_", " "), *numbers]))
    return rows
