"""Several runs, grouped by variant, judged alike: means and deviations over the seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jrl.generation.evaluate import Scores
from jrl.generation.report import Spread, spreads
from jrl.generation.session import Session, Settings, digest
from jrl.training.files import write_atomically

RESULT = "ablation.json"


def grouped(entries: Sequence[str]) -> dict[str, list[str]]:
    """Runs by variant, in the order given.

    Args:
        entries: VARIANT=DIR each, one for each seed.

    Raises:
        ValueError: an entry is not of this form, or a run comes twice.
    """
    found: dict[str, list[str]] = {}
    for entry in entries:
        variant, separator, folder = entry.partition("=")
        if not separator or not variant.strip() or not folder.strip():
            raise ValueError(f"run: expected VARIANT=DIR, got {entry!r}")
        found.setdefault(variant.strip(), []).append(folder.strip())
    places = [Path(folder).resolve() for several in found.values() for folder in several]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"run: {place} is given twice")
    return found


def ablation(
    runs: Mapping[str, Sequence[str]],
    out: str | Path,
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, dict[str, Spread]], dict[str, Any]]:
    """Judge every run on the same texts and sum up each variant.

    Scores are kept in `ablation.json` by the digest of the run that they are of (`digest`), and not made again under the same
    settings.

    Args:
        runs: folders by variant, one a seed.
        out: folder.
        settings: how to judge.
        say: is told of each run.

    Returns:
        Spreads by variant and score, and what `ablation.json` holds.

    Raises:
        FileNotFoundError, TypeError, ValueError: see `Session`; no run.
    """
    folders = {str(folder): variant for variant, several in runs.items() for folder in several}
    if not folders:
        raise ValueError("runs: expected at least one, got none")
    path, protocol = Path(out) / RESULT, settings.protocol()
    values = _kept(path, protocol)
    known = values["scores"]
    session: Session | None = None
    digests = {folder: digest(folder) for folder in folders}
    for folder, variant in folders.items():
        if digests[folder] not in known:
            if session is None:
                session = Session(folder, settings, say)
                if values.setdefault("texts", session.texts) != session.texts:
                    raise ValueError(
                        f"{path}: holds scores of other texts than those of {folder}; name another folder"
                    )
            known[digests[folder]] = asdict(session.score(folder))
            _write(path, values)
        say(f"{variant}, {folder}: {_line(known[digests[folder]])}")
    found = {
        variant: spreads([Scores(**known[digests[str(folder)]]) for folder in several])
        for variant, several in runs.items()
    }
    values["runs"] = {
        folder: {"variant": variant, "digest": digests[folder]} for folder, variant in folders.items()
    }
    values["variants"] = {
        variant: {name: asdict(spread) for name, spread in several.items()}
        for variant, several in found.items()
    }
    _write(path, values)
    return found, values


def _kept(path: Path, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call wrote: "scores" by the digest of the run that they are of."""
    if not path.is_file():
        return {"settings": dict(protocol), "scores": {}}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = values["settings"] == protocol
        for scores in values["scores"].values():
            Scores(**scores)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result of this command: {error!r}") from error
    if not same:
        raise ValueError(f"{path}: holds scores under other settings; name another folder with --out")
    return values


def _line(scores: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if value is not None)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False).encode())
