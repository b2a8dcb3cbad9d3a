"""Human rankings of generated pictures: read from a file, summed up with intervals."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("item", "annotator", "criterion", "system", "rank")
_WITHOUT = "overall"


@dataclass(frozen=True)
class Judgement:
    """One annotator's order of the systems' pictures of one text, by one criterion.

    Attributes:
        item: the text.
        annotator: who.
        criterion: such as "realism" or "alignment".
        ranks: of each system, 1 for the best; equal numbers are ties.
    """

    item: str
    annotator: str
    criterion: str
    ranks: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval that 95% of the bootstrap's means lie in."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """How one system fares by one criterion.

    Attributes:
        first: share of the judgements that rank it first; n systems that share the first place have 1/n of it each.
        mean_rank: from 1; tied systems share the mean of their places.
    """

    first: Estimate
    mean_rank: Estimate


def read_rankings(path: str | Path) -> list[Judgement]:
    """Read judgements from a CSV file or a JSON list, a row a system.

    Columns, or keys: item, annotator, system, rank, and criterion where there are several.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, a column is missing, a rank is no positive number, or the rows of a judgement do not rank
            every system once.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"rankings: no file {path}")
    try:
        if path.suffix.lower() == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: neither CSV nor JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected rows with {', '.join(COLUMNS)}, got none")
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for number, row in enumerate(rows, start=1):
        item, annotator, criterion, system, rank = _fields(row, f"{path}, row {number}")
        ranks = found.setdefault((item, annotator, criterion), {})
        if system in ranks:
            raise ValueError(f"{path}, row {number}: {annotator} ranks {system} twice for {item!r}")
        ranks[system] = rank
    return check_rankings([Judgement(*key, ranks) for key, ranks in found.items()])


def check_rankings(judgements: Iterable[Judgement]) -> list[Judgement]:
    """The judgements, if each ranks the systems that all others rank by its criterion.

    Raises:
        ValueError: there is none, or one lacks a system.
    """
    judgements = list(judgements)
    if not judgements:
        raise ValueError("judgements: expected at least one, got none")
    systems: dict[str, set[str]] = {}
    for one in judgements:
        systems.setdefault(one.criterion, set()).update(one.ranks)
    for one in judgements:
        missing = sorted(systems[one.criterion] - set(one.ranks))
        if missing:
            raise ValueError(
                f"judgements: {one.annotator} does not rank {', '.join(missing)} for {one.item!r} by {one.criterion}"
            )
        if len(one.ranks) < 2:
            raise ValueError(f"judgements: expected at least 2 systems, got {', '.join(one.ranks)}")
    return judgements


def human_rankings(
    judgements: Iterable[Judgement], *, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, Standing]]:
    """How the systems stand by each criterion: share of first places and mean rank, best first.

    The interval is the percentile bootstrap over items: the annotators of one item see the same pictures, so that their
    judgements are drawn together.

    Args:
        judgements: of any number of items, annotators and criteria.
        resamples: of the bootstrap.
        seed: of it.

    Returns:
        Standings by criterion and system.

    Raises:
        ValueError: see `check_rankings`; less than one resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    by_criterion: dict[str, list[Judgement]] = {}
    for one in check_rankings(judgements):
        by_criterion.setdefault(one.criterion, []).append(one)
    return {
        criterion: _standings(several, resamples, np.random.default_rng(seed))
        for criterion, several in sorted(by_criterion.items())
    }


def _standings(
    judgements: list[Judgement], resamples: int, generator: np.random.Generator
) -> dict[str, Standing]:
    systems = sorted(judgements[0].ranks)
    ranks = np.array([[one.ranks[system] for system in systems] for one in judgements])
    better = (ranks[:, :, None] > ranks[:, None, :]).sum(axis=2)
    tied = (ranks[:, :, None] == ranks[:, None, :]).sum(axis=2)
    places = better + (tied + 1) / 2
    is_first = better == 0
    first = is_first / is_first.sum(axis=1, keepdims=True)
    names, item = np.unique([one.item for one in judgements], return_inverse=True)
    # sums over the judgements of each item, whose number may differ: [items, 2, systems], [items]
    values = np.stack([first, places], axis=1)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, item, values)
    counts = np.bincount(item, minlength=len(names))
    means = np.empty((resamples, *values.shape[1:]))
    for resample in range(resamples):
        drawn = generator.integers(len(names), size=len(names))
        means[resample] = sums[drawn].sum(axis=0) / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    mean = values.mean(axis=0)

    def estimate(kind: int, place: int) -> Estimate:
        return Estimate(*(float(each[kind, place]) for each in (mean, low, high)))

    found = {name: Standing(estimate(0, place), estimate(1, place)) for place, name in enumerate(systems)}
    return dict(sorted(found.items(), key=lambda entry: (-entry[1].first.mean, entry[0])))


def _fields(row: Mapping[str, Any], where: str) -> tuple[str, str, str, str, float]:
    values = {"criterion": _WITHOUT, **{key: value for key, value in row.items() if value not in (None, "")}}
    missing = [name for name in COLUMNS if name not in values]
    if missing:
        raise ValueError(f"{where}: has no {', '.join(missing)}")
    try:
        rank = float(values["rank"])
    except (TypeError, ValueError):
        rank = float("nan")
    if not 1 <= rank < float("inf"):
        raise ValueError(f"{where}: rank: expected a number of 1 or more, got {values['rank']!r}")
    item, annotator, criterion, system = (str(values[name]).strip() for name in COLUMNS[:4])
    return item, annotator, criterion, system, rank
