"""`jrl probe`: what the image encoder of a run has learned, on generated scenes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jrl.downstream.probe import TASKS, choose, probe


def main(arguments: Sequence[str]) -> int:
    """Probe a run and write `probe.json`, `probe.md` and a picture a task.

    Args:
        arguments: those after `jrl probe`.

    Returns:
        0.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: an option is out of range, or the encoder cannot serve a task.
    """
    options = _parser().parse_args(list(arguments))
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    # before anything slow begins
    choose(names)
    if options.scenes < 8:
        raise ValueError(f"scenes: expected at least 8, got {options.scenes}")

    from rich.console import Console

    from jrl.downstream.pictures import save_picture
    from jrl.downstream.report import to_json, to_markdown, to_table
    from jrl.downstream.scenes import scene_parts
    from jrl.training.files import check_folder, write_atomically
    from jrl.training.run import Run

    out = check_folder("out", options.out or Path(options.run) / "probe")
    run = Run.load(options.run, device=options.device, allow_pickle=options.allow_pickle)
    data = scene_parts(
        run.transform,
        train=options.scenes,
        val=options.scenes // 4,
        test=options.scenes // 4,
        max_objects=options.max_objects,
        seed=options.seed,
    )
    outcomes = probe(
        run,
        data,
        names,
        frozen=not options.finetune,
        against_random=options.against_random,
        epochs=options.epochs,
        lr=options.lr,
        seed=options.seed,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    out.mkdir(parents=True, exist_ok=True)
    values = {
        "run": str(options.run),
        "system": type(run.system).__name__,
        "encoder": "fine-tuned" if options.finetune else "frozen",
        "seed": options.seed,
        "scenes": {name: len(part) for name, part in data.items()},
        "max_objects": options.max_objects,
        "image_size": run.transform.size,
        "tasks": to_json(outcomes),
    }
    write_atomically(out / "probe.json", json.dumps(values, indent=2, allow_nan=False).encode())
    write_atomically(out / "probe.md", f"{to_markdown(outcomes)}\n".encode())
    for name, outcome in outcomes.items():
        save_picture(outcome, data["test"], out / f"{name}.png")
    console = Console()
    console.print(to_table(outcomes, f"{options.run}, {values['encoder']} encoder, per cent"))
    console.print(f"saved {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jrl probe",
        description="Measure what the image encoder of a run has learned, by small heads on generated scenes.",
    )
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"some of {','.join(TASKS)} (all)")
    parser.add_argument("--out", help="folder of the results; RUN/probe otherwise")
    parser.add_argument("--finetune", action="store_true", help="train a copy of the encoder with each head")
    parser.add_argument(
        "--against-random", action="store_true", help="also measure the same system with random weights"
    )
    parser.add_argument(
        "--scenes",
        type=int,
        default=2000,
        help="to train on (2000); a quarter as many choose the epoch, and as many test",
    )
    parser.add_argument("--max-objects", type=int, default=4, help="shapes in a scene, 1 to 4 (4)")
    parser.add_argument("--epochs", type=int, help="of each head; the task's own number otherwise")
    parser.add_argument("--lr", type=float, help="of each head; the task's own otherwise")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the heads (0)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-pickle", action="store_true", help="take pickled weights")
    return parser
