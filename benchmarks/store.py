"""results.json: one machine, one set of versions and one commit; measured again, a case replaces itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from .measure import Rates

ROOT = Path(__file__).resolve().parents[1]
# What a figure depends on.
SOURCES = ("jrl_kernels", "csrc", "setup.py", "benchmarks", ":!benchmarks/results")
SAME = ("device", "cpu", "threads", "python", "torch", "cuda", "triton", "commit")
FILE = "results.json"


def git(*arguments: str, root: Path = ROOT) -> str:
    """What git answers; RuntimeError with its own words where it does not."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as missing:
        raise RuntimeError("git is not installed") from missing
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"git {' '.join(arguments)}: exit {done.returncode}")
    return done.stdout.strip()


def commit(root: Path = ROOT) -> str | None:
    """The commit of the sources, with "-dirty" where they differ from it; None where there is no git."""
    try:
        name = git("rev-parse", "HEAD", root=root)
        return f"{name}-dirty" if git("status", "--porcelain", "--", *SOURCES, root=root) else name
    except RuntimeError:
        return None


def opened(folder: Path | None, about: dict[str, Any], fresh: bool = False) -> dict[str, Any]:
    """The results of `folder`, to be added to; empty ones without any, or with `fresh`.

    Args:
        folder: holds results.json, or will; None for results that are not kept.
        about: what `machine` says, with the commit.
        fresh: drop what is there.

    Raises:
        ValueError: what is there is of another machine, version or commit.
    """
    path = None if folder is None else folder / FILE
    if fresh or path is None or not path.is_file():
        return {**about, "rates": {}, "rows": []}
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    pairs = [(name, kept.get(name), about.get(name)) for name in SAME]
    theirs, ours = kept.get("libraries", {}), about.get("libraries", {})
    pairs += [(name, theirs[name], ours[name]) for name in sorted(theirs.keys() & ours.keys())]
    other = [f"{name} {there}, and this is {here}" for name, there, here in pairs if there != here]
    if other:
        raise ValueError(f"{path} holds results of {'; '.join(other)}; --fresh drops them")
    return {"rates": {}, "rows": [], **kept, **about, "libraries": {**theirs, **ours}}


def add_rates(result: dict[str, Any], dtype: str, rates: Rates) -> Rates:
    """The best rates that any run into these results has seen, which set the floor of all their rows."""
    seen = result["rates"].get(f"torch.{dtype}", rates._asdict())
    best = Rates(max(rates.flops, seen["flops"]), max(rates.bytes, seen["bytes"]))
    result["rates"][f"torch.{dtype}"] = best._asdict()
    for row in result["rows"]:
        if row["dtype"] == dtype and "share_of_floor" in row:
            row["share_of_floor"] = share_of_floor(row, best)
    return best


def share_of_floor(row: dict[str, Any], rates: Rates) -> float:
    """The time that products or traffic take at the machine's best, over the time taken."""
    return max(row["flops"] / rates.flops, row["bytes"] / rates.bytes) * 1e3 / float(row["milliseconds"])


def replace(result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put the rows of one case in the place of those it had, or at the end."""
    keys = ("op", "shape", "dtype")
    case = [rows[0][key] for key in keys]
    kept = result["rows"]
    same = [[row[key] for key in keys] == case for row in kept]
    place = same.index(True) if True in same else len(kept)
    rest = [row for row, measured_again in zip(kept, same, strict=True) if not measured_again]
    result["rows"] = rest[:place] + rows + rest[place:]


def save(result: dict[str, Any], folder: Path) -> None:
    """Whole or not at all: a run that is cut short leaves what was there before."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{FILE}.new"
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, folder / FILE)
