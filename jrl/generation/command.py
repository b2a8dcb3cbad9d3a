"""`jrl generation-report|generation-ablation|scene-classifier|human-rankings`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jrl.generation.session import Settings
from jrl.training.files import check_folder, write_atomically

REAL = "real pictures"


def main(command: str, arguments: Sequence[str]) -> int:
    """Carry out one of `COMMANDS`.

    Args:
        command: its name.
        arguments: those after it.

    Returns:
        0.

    Raises:
        FileNotFoundError: there is no such run, folder or file.
        TypeError: a run's system does not generate pictures.
        ValueError: an option is out of range, or a judge was trained with.
    """
    return COMMANDS[command](arguments)


def _report(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jrl generation-report",
        description="Generate a picture of each of some texts of a run's data, and judge them beside the real ones.",
    )
    parser.add_argument("--run", required=True, help="folder of a run of an XMCGAN")
    _add_judging(parser)
    parser.add_argument("--out", help="folder of the results; RUN/generation otherwise")
    options = parser.parse_args(list(arguments))
    out = check_folder("out", options.out or Path(options.run) / "generation")
    from jrl.generation.report import scores_table
    from jrl.generation.session import Session

    settings = _settings(options)
    session = Session(options.run, settings, _say)
    rows = {options.run: session.score(options.run), REAL: session.real()}
    values = {
        "settings": settings.protocol(),
        "distinct": session.distinct,
        "scores": {name: asdict(one) for name, one in rows.items()},
    }
    _write(out, "generation", values, scores_table(rows))
    return 0


def _ablation(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jrl generation-ablation",
        description="Judge several runs, grouped by variant, into one table of means and deviations over their seeds.",
    )
    parser.add_argument(
        "--run",
        required=True,
        action="append",
        metavar="VARIANT=DIR",
        help="a run of a variant; once for each seed of each variant",
    )
    _add_judging(parser)
    parser.add_argument(
        "--out", required=True, help="folder; runs that it has scores of are not judged again"
    )
    options = parser.parse_args(list(arguments))
    from jrl.generation.ablation import ablation, grouped
    from jrl.generation.report import ablation_table

    out, runs = check_folder("out", options.out), grouped(options.run)
    found, values = ablation(runs, out, _settings(options), say=_say)
    table = ablation_table(found, {name: len(several) for name, several in runs.items()})
    _write(out, "ablation", values, table)
    return 0


def _classifier(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jrl scene-classifier",
        description="Train the network that judges generated scenes: features, logits and found objects.",
    )
    parser.add_argument("--out", default="runs/scene_classifier", help="folder of the network")
    parser.add_argument(
        "--size", type=int, default=32, help="32 or 64 pixels, best those of the generator (32)"
    )
    parser.add_argument("--scenes", type=int, default=4000, help="to train on; a quarter as many test (4000)")
    parser.add_argument("--max-objects", type=int, default=4, help="shapes in a scene, 1 to 4 (4)")
    parser.add_argument("--epochs", type=int, default=10, help="over the scenes (10)")
    parser.add_argument(
        "--width", type=int, default=24, help="of the first layer; features are 4 times as wide (24)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and order (0)")
    options = parser.parse_args(list(arguments))
    out = check_folder("out", options.out)
    from jrl.generation.recipe import train_scene_classifier

    network, found = train_scene_classifier(
        options.size,
        scenes=options.scenes,
        epochs=options.epochs,
        width=options.width,
        max_objects=options.max_objects,
        seed=options.seed,
        say=_say,
    )
    network.save(out)
    values = {**{name: value for name, value in vars(options).items() if name != "out"}, **asdict(found)}
    write_atomically(out / "recognition.json", json.dumps(values, indent=2).encode())
    print(
        f"{found.scenes} scenes not trained on: recall {100 * found.recall:.1f}%, "
        f"precision {100 * found.precision:.1f}%, all right {100 * found.exact:.1f}%"
    )
    print(f"saved {out}")
    return 0


def _rankings(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jrl human-rankings", description="Sum up how annotators ranked the pictures of several systems."
    )
    parser.add_argument("--file", required=True, help="CSV or JSON: item, annotator, criterion, system, rank")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument("--out", required=True, help="folder of the results")
    options = parser.parse_args(list(arguments))
    out = check_folder("out", options.out)
    from jrl.evaluation.rankings import human_rankings, read_rankings
    from jrl.generation.report import rankings_table

    judgements = read_rankings(options.file)
    found = human_rankings(judgements, resamples=options.resamples, seed=options.seed)
    values = {
        "judgements": len(judgements),
        "items": len({one.item for one in judgements}),
        "annotators": len({one.annotator for one in judgements}),
        "resamples": options.resamples,
        "seed": options.seed,
        "standings": {
            criterion: {system: asdict(one) for system, one in several.items()}
            for criterion, several in found.items()
        },
    }
    _write(out, "rankings", values, rankings_table(found))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "generation-report": _report,
    "generation-ablation": _ablation,
    "scene-classifier": _classifier,
    "human-rankings": _rankings,
}


def _add_judging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features", help="folder of `jrl scene-classifier`, or a file *.pt2 (--allow-pickle): FID, IS"
    )
    parser.add_argument(
        "--encoder", help="folder of a run that the generator was not trained with: R-precision"
    )
    parser.add_argument("--part", default="test", help="part of the run's data (test)")
    parser.add_argument(
        "--samples", type=int, default=1000, help="texts to generate from (1000; published: 30000)"
    )
    parser.add_argument("--candidates", type=int, default=100, help="texts that R-precision compares (100)")
    parser.add_argument("--splits", type=int, default=1, help="of the inception score (1)")
    parser.add_argument("--seed", type=int, default=0, help="of texts, noise and mismatched texts (0)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures generated together (64)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-pickle", action="store_true", help="take pickled weights and *.pt2")


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})


def _write(out: Path, name: str, values: dict[str, Any], table: str) -> None:
    write_atomically(out / f"{name}.json", json.dumps(values, indent=2, allow_nan=False).encode())
    write_atomically(out / f"{name}.md", f"{table}\n".encode())
    print(table)
    print(f"saved {out}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
