"""`python -m benchmarks.models [--model CLIP] [--device cpu] [--limit GIB] [--out DIR] [--quick]`

One training step (forward, backward, AdamW) of CLIP with the fused loss against the loss over all logits, and of transformers'
GroupViT with and without `apply_to_group_vit`, at growing batch: time with the variants in turn, peak memory, and the largest
batch that fits. The loss and the gradients of both must agree before anything is timed. The figures join what DIR/results.json
holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..measure import Step, interleave, machine
from ..run import commit, save
from .limits import GIB, REFUSALS, fits, largest, peak
from .steps import DTYPES, MODELS, VARIANTS, disagreement, step

Row = dict[str, Any]
TOLERANCE = 1e-3


def steps_of(name: str, batch: int, device: str, about: Row, repeats: int) -> list[Row]:
    """Peak memory and time of both variants at one batch."""
    rows: dict[str, Row] = {variant: {**about, "variant": variant, "batch": batch} for variant in VARIANTS}
    ready: dict[str, Step] = {}
    for variant, row in rows.items():
        try:
            row["peak_bytes"] = peak(name, variant, batch, device)
        except REFUSALS as error:
            row["refused"] = f"out of memory: {str(error).splitlines()[0]}"
    for variant, row in rows.items():
        if "refused" not in row:
            ready[variant] = step(name, variant, batch, device)
    for variant, timing in interleave(ready, device, repeats=repeats, warmup=1).items():
        rows[variant] |= {
            "milliseconds": timing.median * 1e3,
            "low": timing.low * 1e3,
            "high": timing.high * 1e3,
            "repeats": timing.repeats,
        }
    ready.clear()
    if device == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


def measure(name: str, device: str, limit: int, quick: bool) -> Iterator[list[Row]]:
    """The rows of one model, a few at a time."""
    dtype = str(DTYPES[device]).removeprefix("torch.")
    error = disagreement(name, device)
    about = {"model": name, "dtype": dtype, "error": error}
    if not error <= TOLERANCE:
        reason = f"fused disagrees with eager by {error:.2g}"
        yield [{**about, "variant": variant, "refused": reason} for variant in VARIANTS]
        return
    batches = MODELS[name].sizes[device].batches
    for batch in batches[:1] if quick else batches:
        yield steps_of(name, batch, device, about, 3 if quick else 7)
    if quick:
        return
    for variant in VARIANTS:
        fit = partial(_fits, name, variant, device, limit)
        found = largest(fit, batches[-1])
        yield [
            {
                "model": name,
                "dtype": dtype,
                "variant": variant,
                "largest_batch": found,
                "limit_bytes": limit,
            }
        ]


def _fits(name: str, variant: str, device: str, limit: int, batch: int) -> bool:
    return fits(name, variant, batch, device, limit)


def joined(path: Path, about: Row, rows: list[Row], names: Sequence[str]) -> Row:
    """What the file holds, with its rows of the models in `names` replaced.

    Raises:
        ValueError: it holds figures of another machine or torch.
    """
    if not path.is_file():
        return {**about, "rates": {}, "rows": [], "models": rows}
    result: Row = json.loads(path.read_text(encoding="utf-8"))
    for key in ("device", "threads", "torch"):
        if result.get(key) != about[key]:
            raise ValueError(
                f"{path}: expected {key} {about[key]!r}, got {result.get(key)!r}: give another --out"
            )
    kept = [row for row in result.get("models", []) if row["model"] not in names]
    return {**result, "models": kept + rows}


def table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table(title="training steps of whole models")
    for column in ("model", "variant", "batch", "dtype", "ms", "spread", "peak MiB"):
        out.add_column(column, justify="left" if column in ("model", "variant", "dtype") else "right")
    for row in rows:
        start = (row["model"], row["variant"])
        if "largest_batch" in row:
            limit = f"{row['limit_bytes'] / GIB:.3g} GiB"
            out.add_row(*start, f"{row['largest_batch']:,}", row["dtype"], f"largest that fits {limit}")
        elif "refused" in row:
            out.add_row(*start, f"{row['batch']:,}" if "batch" in row else "", row["dtype"], row["refused"])
        else:
            spread = f"{row['low']:.1f}-{row['high']:.1f}"
            memory = f"{row['peak_bytes'] / 2**20:.0f}"
            out.add_row(
                *start, f"{row['batch']:,}", row["dtype"], f"{row['milliseconds']:.1f}", spread, memory
            )
    Console(width=None if sys.stdout.isatty() else 150).print(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description="Compare training steps of whole models."
    )
    parser.add_argument(
        "--model", choices=sorted(MODELS), action="append", help="one (repeatable); all without"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--limit", type=float, help="GiB that the largest batch must fit; all of a GPU, and on a CPU 2"
    )
    parser.add_argument("--out", type=Path, help="folder of the results.json that takes the figures")
    parser.add_argument("--quick", action="store_true", help="the smallest batch only, and no largest one")
    given = parser.parse_args(argv)
    if given.limit is not None and not given.limit > 0:
        parser.error(f"--limit: expected a positive number of GiB, got {given.limit}")
    if given.limit is not None:
        limit = int(given.limit * GIB)
    else:
        limit = torch.cuda.get_device_properties(0).total_memory if given.device == "cuda" else 2 * GIB
    names = given.model or list(MODELS)
    about = {**machine(given.device), "commit": commit()}
    path = None if given.out is None else given.out / "results.json"
    rows: list[Row] = []
    try:
        if path is not None:
            joined(path, about, rows, names)
        for name in names:
            for found in measure(name, given.device, limit, given.quick):
                rows += found
                if path is not None:
                    # After every batch: a run that is cut short keeps what it measured.
                    save(joined(path, about, rows, names), given.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table(rows)
    return 1 if any(str(row.get("refused", "")).startswith("fused disagrees") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
