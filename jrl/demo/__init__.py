"""`jrl demo`: train CLIP on colour emoji, evaluate it, and write a report."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jrl.demo.train import Record
    from jrl.training.data import CaptionDataModule

__all__ = ["main"]

REPORT = ("metrics.json", "curves.png", "retrieval.png", "loss_cost.png", "report.md", "report.html")
_DECIDED_HERE = ("--run", "--resume", "--overwrite", "--ckpt_path", "--config", "--data.dataset")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and report into one folder; what is there already is kept.

    Args:
        argv: the arguments after `jrl demo`; those of the process when None.

    Returns:
        0. Whether the bars are met is said, and is no error.

    Raises:
        FileNotFoundError: emoji were asked for and there is no font.
        KeyboardInterrupt: training was interrupted; the same command resumes it.
        ValueError: the folder holds something else than was asked for, or an option is no good.
    """
    options, changes = _parse(argv)
    folder = Path(options.out)
    start = time.perf_counter()
    from jrl.demo.train import default_config, train

    record = _record(folder, options, changes)
    before = dict(record.training)
    trained = train(folder, record, default_config(record.data), _say)
    if not trained:
        took = before.get("seconds", 0.0)
        _say(f"{folder}: already trained ({took / 60:.1f} minutes then); --fresh trains again")
    _write_report(folder, record, options.loss_batches, rebuild=trained)
    _say(f"done in {(time.perf_counter() - start) / 60:.1f} minutes: {folder / 'report.html'}")
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="jrl demo",
        allow_abbrev=False,
        description="Train CLIP on colour emoji, evaluate it and write a report.",
        epilog="Options of `jrl fit` change the recipe: jrl demo --out runs/short --trainer.max_epochs 5",
    )
    parser.add_argument("--out", default="runs/demo", help="folder of the run (runs/demo)")
    parser.add_argument(
        "--data",
        choices=("emoji", "scenes"),
        help="pictures; emoji, and generated scenes where no emoji font can be had, when not given",
    )
    parser.add_argument("--no-install", action="store_true", help="never install the emoji font")
    parser.add_argument("--fresh", action="store_true", help="remove the demo in the folder and start over")
    parser.add_argument(
        "--loss-batches",
        type=_batches,
        metavar="N,N,…",
        help="batch sizes at which the losses are compared (256,512,…,8192)",
    )
    options, changes = parser.parse_known_args(argv)
    for change in changes:
        if change.split("=")[0] in _DECIDED_HERE:
            raise ValueError(f"{change.split('=')[0]}: `jrl demo` decides this itself; see `jrl demo --help`")
    if changes and not changes[0].startswith("--"):
        raise ValueError(f"arguments: expected options, got {changes[0]!r}")
    return options, changes


def _batches(text: str) -> tuple[int, ...]:
    sizes = tuple(sorted({int(size) for size in text.split(",")}))
    if sizes[0] < 2:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 2, got {sizes[0]}")
    return sizes


def _record(folder: Path, options: argparse.Namespace, changes: list[str]) -> Record:
    """The record of the run that lies in the folder, or of the one that begins."""
    from jrl.demo.font import ensure_font
    from jrl.demo.train import RECORD, Record, clear, default_config, digest

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, {folder} is a file")
    if (folder / "checkpoints").exists() and not (folder / RECORD).exists():
        raise ValueError(f"out: {folder} holds a run that is not a demo's; choose another folder")
    if options.fresh:
        clear(folder, REPORT)
    record = Record.load(folder)
    if record is None:
        data, why = options.data or "emoji", None
        if data == "emoji":
            missing = ensure_font(install=not options.no_install, keywords=True, say=_say)
            if missing is not None and options.data == "emoji":
                raise FileNotFoundError(f"data: emoji were asked for, but {missing}")
            if missing is not None:
                data, why = "scenes", missing
                _say(f"{missing}\ntraining on generated scenes instead")
        return Record(data, why, digest(default_config(data)), changes)
    if options.data not in (None, record.data):
        raise ValueError(
            f"data: {folder} holds a demo on {record.data}, got {options.data}; --fresh starts over"
        )
    if changes and changes != record.changes:
        was = shlex.join(record.changes) or "no changes"
        raise ValueError(f"{shlex.join(changes)}: {folder} was begun with {was}; --fresh starts over")
    if record.why:
        _say(f"{folder} holds a demo on generated scenes; --fresh looks for the emoji font again")
    if digest(default_config(record.data)) != record.recipe:
        _say(f"{folder} was begun with another recipe than today's, and keeps it; --fresh starts over")
    if record.data == "emoji":
        # other keywords than at the start would make another vocabulary
        missing = ensure_font(install=not options.no_install, keywords=False, say=_say)
        if missing is not None:
            raise FileNotFoundError(f"{folder} holds a demo on emoji, but {missing}")
    return record


def _write_report(
    folder: Path, record: Record, loss_batches: tuple[int, ...] | None, *, rebuild: bool
) -> None:
    """Make what is missing of the report; all of it after a training."""
    import torch

    from jrl.demo import figures, grid, report
    from jrl.demo.document import to_html, to_markdown
    from jrl.demo.evaluation import evaluate_run
    from jrl.demo.files import write_bytes, write_json
    from jrl.demo.loss_cost import SIZES, measure
    from jrl.training.command import data_module_of

    @functools.cache
    def source() -> CaptionDataModule:
        data = data_module_of(folder)
        data.setup("predict")
        return data

    metrics = {} if rebuild else _metrics(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stale = set(REPORT) if rebuild else {name for name in REPORT if not (folder / name).is_file()}
    head = {"data": record.data, "why": record.why, "changes": record.changes, "training": record.training}
    if any(metrics.get(name) != value for name, value in head.items()) or "evaluation" not in metrics:
        _say("evaluating")
        found = evaluate_run(folder, source(), device)
        metrics = {**head, "machine": _machine(), "evaluation": found}
        write_json(folder / "metrics.json", metrics)
        stale |= set(REPORT)
    if "loss_cost" not in metrics or _measured(metrics["loss_cost"]) != (
        loss_batches or _measured(metrics["loss_cost"])
    ):
        _say("measuring the loss")
        metrics["loss_cost"] = measure(loss_batches or SIZES, device=device)
        write_json(folder / "metrics.json", metrics)
        stale |= {"loss_cost.png", "report.md", "report.html"}
    if stale:
        _say("writing the report")
    if "curves.png" in stale:
        size = record.training["batch_size"]
        figures.save_curves(figures.read_curves(folder), folder / "curves.png", batch_size=size)
    if "loss_cost.png" in stale:
        figures.save_loss_cost(metrics["loss_cost"], folder / "loss_cost.png")
    if "retrieval.png" in stale:
        shown = report.sections(metrics)
        keys = [key for _, _, queries in shown for query in queries for key in query["found"]]
        grid.save_grid(shown, grid.pictures_of(source(), keys), folder / "retrieval.png")
    if stale:
        blocks = report.build(metrics, folder)
        write_bytes(folder / "report.md", to_markdown(blocks).encode())
        write_bytes(folder / "report.html", to_html(blocks, report.TITLES[record.data]).encode())
    for bar in metrics["evaluation"]["bars"]:
        name = f"{bar['part']} {bar['direction']} {bar['metric']}"
        _say(f"{name}: {100 * bar['value']:.1f}%, bar {100 * bar['bar']:.0f}%: {report.bar_words(bar)}")


def _metrics(folder: Path) -> dict[str, Any]:
    from jrl.demo.files import read_json

    try:
        return read_json(folder / "metrics.json")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        _say(f"{error}; evaluating again")
        return {}


def _measured(cost: dict[str, Any]) -> tuple[int, ...]:
    return tuple(sorted([*(row["batch"] for row in cost["rows"]), *map(int, cost["left_out"])]))


def _machine() -> dict[str, Any]:
    from jrl_kernels import info

    found = info.collect()
    versions = {name: found["versions"].get(name) for name in ("jrl", "python", "torch", "triton", "numpy")}
    gpus = found["gpus"]
    return {"cpu": found["cpu"]["model"], "gpu": gpus[0]["name"] if gpus else None, "versions": versions}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
