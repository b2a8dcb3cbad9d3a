"""The scores of generated and real pictures as JSON types and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from jrl.evaluation.rankings import Estimate, Standing
from jrl.generation.evaluate import Scores

# heading, factor, decimals
_SHOWN = {
    "fid": ("FID", 1, 2),
    "inception_score": ("IS", 1, 2),
    "r_precision": ("R-precision %", 100, 1),
    "soa_c": ("SOA-C %", 100, 1),
    "soa_i": ("SOA-I %", 100, 1),
    "found_unnamed": ("found unnamed %", 100, 1),
}
SCORES = tuple(_SHOWN)


@dataclass(frozen=True)
class Spread:
    """A score over the seeds of a variant.

    Attributes:
        mean: over the seeds.
        deviation: their standard deviation, over n − 1; None for one seed.
        values: of each.
    """

    mean: float
    deviation: float | None
    values: list[float]


def spreads(scores: Sequence[Scores]) -> dict[str, Spread]:
    """Mean and deviation of each score that every seed has.

    Raises:
        ValueError: no seed.
    """
    if not scores:
        raise ValueError("scores: expected at least one seed, got none")
    found = {}
    for name in SCORES:
        values = [getattr(one, name) for one in scores]
        if all(value is not None for value in values):
            found[name] = Spread(fmean(values), stdev(values) if len(values) > 1 else None, values)
    return found


def scores_table(rows: Mapping[str, Scores]) -> str:
    """A row a set of pictures, as Markdown; scores that none has are left out."""
    names = [name for name in SCORES if any(getattr(one, name) is not None for one in rows.values())]
    lines = _heading("", names)
    for row, one in rows.items():
        cells = [_number(getattr(one, name), name) for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_table(variants: Mapping[str, Mapping[str, Spread]], seeds: Mapping[str, int]) -> str:
    """A row a variant, mean ± standard deviation over its seeds."""
    names = [name for name in SCORES if any(name in found for found in variants.values())]
    lines = _heading("variant | seeds", names)
    for variant, found in variants.items():
        cells = []
        for name in names:
            one = found.get(name)
            mean = _number(None if one is None else one.mean, name)
            spread = "" if one is None or one.deviation is None else f" ± {_number(one.deviation, name)}"
            cells.append(mean + spread)
        lines.append(f"| {variant} | {seeds[variant]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rankings_table(standings: Mapping[str, Mapping[str, Standing]]) -> str:
    """A row a criterion and system, with the intervals of the bootstrap."""
    lines = ["| criterion | system | ranked first % | mean rank |", "|---|---|--:|--:|"]
    for criterion, found in standings.items():
        for system, one in found.items():
            cells = _estimate(one.first, 100, 1), _estimate(one.mean_rank, 1, 2)
            lines.append(f"| {criterion} | {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _heading(first: str, names: Sequence[str]) -> list[str]:
    heads = [_SHOWN[name][0] for name in names]
    return [f"| {first} | {' | '.join(heads)} |", f"|{'---|' * (first.count('|') + 1)}{'--:|' * len(heads)}"]


def _number(value: float | None, name: str) -> str:
    _, factor, decimals = _SHOWN[name]
    return "–" if value is None else f"{factor * value:.{decimals}f}"


def _estimate(one: Estimate, factor: int, decimals: int) -> str:
    mean, low, high = (f"{factor * value:.{decimals}f}" for value in (one.mean, one.low, one.high))
    return f"{mean} ({low} to {high})"
