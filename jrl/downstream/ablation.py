"""`jrl ablate`: what each part of the mutual-information system is worth, in one table of downstream tasks and grounding."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from jrl.data.tokenizer import load_tokenizer
from jrl.downstream.probe import RETRIEVAL, TASKS, choose, probe
from jrl.downstream.scenes import scene_parts
from jrl.grounding import ground, scene_examples
from jrl.grounding.evaluate import SYSTEM
from jrl.training.files import write_atomically
from jrl.training.run import Run

RESULT, TABLE = "result.json", "ablation"
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: of its folder.
        words: what it is, for the table.
        arguments: replace arguments of the system.
        objectives: single-modality objectives it has: "image", "text".
        trained: False leaves the weights as they are drawn.
    """

    name: str
    words: str
    arguments: Arguments = field(default_factory=dict)
    objectives: tuple[str, ...] = ()
    trained: bool = True

    @property
    def has_critic(self) -> bool:
        """Whether its critic is trained as long as its encoders, if at all."""
        return bool(self.arguments.get("joint_weight", 1.0))


_ONE: Arguments = {"layers": [{}]}
_SEVERAL: Arguments = {"layers": [{"image": 1, "text": 0}, {"weight": 0.5}]}


def _direction(name: str) -> Arguments:
    return {
        "estimator": {
            "class_path": "jrl.objectives.MutualInformationEstimator",
            "init_args": {"direction": name},
        }
    }


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("random", "random weights", trained=False),
        Variant("deep_infomax", "Deep InfoMax alone", {"joint_weight": 0.0}, ("image",)),
        Variant("one_layer", "joint, one layer"),
        Variant("several_layers", "joint, two layers", _SEVERAL),
        Variant("with_image", "joint, one layer, Deep InfoMax", {}, ("image",)),
        Variant("with_text", "joint, one layer, masked words", {}, ("text",)),
        Variant("with_both", "joint, one layer, both objectives", {}, ("image", "text")),
        Variant("several_with_both", "joint, two layers, both objectives", _SEVERAL, ("image", "text")),
        Variant("image_to_text", "joint, captions contrasted only", _direction("image_to_text")),
        Variant("text_to_image", "joint, pictures contrasted only", _direction("text_to_image")),
    )
}


def variant_config(
    config: Mapping[str, Any], variant: Variant, epochs: int | None, seed: int
) -> dict[str, Any]:
    """The configuration of a training of one variant.

    Args:
        config: of `jrl fit` with a `MutualInformation` system.
        variant: what to change in it.
        epochs: of the training; those of `config` when None.
        seed: of weights, order and noise.

    Returns:
        A new configuration; every variant trains as long as the others, so the stop rule is left out.

    Raises:
        ValueError: `config` is not of such a system, or says no widths of its encoders.
    """
    values: dict[str, Any] = deepcopy(dict(config))
    try:
        system = values["model"]["system"]
        if system["class_path"].rpartition(".")[2] != "MutualInformation":
            raise ValueError(f"config: expected a MutualInformation system, got {system['class_path']}")
        arguments = system["init_args"]
        image = arguments["image_encoder"]["init_args"]["model"]
        text = arguments["text_encoder"]["init_args"]["model"]
        width = image["hidden_sizes"][-1] if "hidden_sizes" in image else image["hidden_size"]
        words: Arguments = {"width": text["hidden_size"], "vocab_size": text["vocab_size"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"config: expected the configuration of a MutualInformation system: {error!r}"
        ) from error
    arguments.update(deepcopy({**_ONE, **variant.arguments}))
    for name in ("image_objective", "text_objective"):
        arguments.pop(name, None)
    if "image" in variant.objectives:
        options = {"local_width": width, "global_width": width, "measure": "nce", "units": 2 * width}
        arguments["image_objective"] = {"class_path": "jrl.objectives.DeepInfoMax", "init_args": options}
    if "text" in variant.objectives:
        words |= _special_ids((values.get("data") or {}).get("tokenizer"))
        arguments["text_objective"] = {"class_path": "jrl.objectives.MaskedWords", "init_args": words}
    values["seed_everything"] = values["model"]["seed"] = seed
    trainer = values.setdefault("trainer", {})
    callbacks = trainer.get("callbacks") or []
    trainer["callbacks"] = [entry for entry in callbacks if not entry["class_path"].endswith("EarlyStopping")]
    trainer["enable_progress_bar"] = False
    if epochs is not None:
        trainer["max_epochs"] = epochs
    return values


def _special_ids(tokenizer: str | None) -> Arguments:
    """Of a tokenizer, or of the one that a run trains when None."""
    if tokenizer is None:
        # [PAD], [UNK], [CLS], [EOS], [MASK]
        return {"mask_token_id": 4, "special_token_ids": [0, 1, 2, 3]}
    loaded = load_tokenizer(tokenizer)
    if loaded.mask_token_id is None:
        raise ValueError(f"config: masked words need a mask token, and the tokenizer in {tokenizer} has none")
    ids = sorted(set(loaded.all_special_ids) - {loaded.mask_token_id})
    return {"mask_token_id": loaded.mask_token_id, "special_token_ids": ids}


def ablate(
    config: Mapping[str, Any],
    out: Path,
    variants: Sequence[str] = tuple(VARIANTS),
    tasks: Sequence[str] = TASKS,
    *,
    epochs: int | None = None,
    scenes: int = 2000,
    head_epochs: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Train the variants one after the other, probe each with its encoder frozen, and write the table.

    What is done already is not done again: a variant with a result is read, a training that was stopped goes on.

    Args:
        config: of `jrl fit`.
        out: folder; a variant is trained in a folder of its name.
        variants: names out of VARIANTS.
        tasks: names out of `jrl.downstream.TASKS`.
        epochs: of each training; those of `config` when None.
        scenes: for the heads to train on; a quarter as many choose their epoch, and as many test.
        head_epochs: of each head; the task's own number when None.
        minutes: start no further variant after so many.
        seed: of weights, data and heads.
        say: is told of each variant.

    Returns:
        Results by variant, as far as they are there; also in `ablation.json` and `ablation.md` in `out`.

    Raises:
        ValueError: a name is unknown, a number out of range, or a folder holds results of other settings.
    """
    names = _known(variants)
    choose(list(tasks))
    if scenes < 8:
        raise ValueError(f"scenes: expected at least 8, got {scenes}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes: expected a positive number, got {minutes}")
    # results from before heads looked through the encoder alone say nothing of that
    settings = {
        "tasks": list(tasks),
        "scenes": scenes,
        "head_epochs": head_epochs,
        "seed": seed,
        "heads": "encoder",
    }
    start = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        values = variant_config(config, VARIANTS[name], epochs, seed)
        settings_here = json.loads(json.dumps({**settings, "config": values}))
        kept = _kept(out / name / RESULT, settings_here)
        if kept is None:
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                say(f"{name}: left for another time")
                continue
            began = time.monotonic()
            run = _trained(values, out / name, VARIANTS[name].trained)
            trained = time.monotonic()
            kept = {
                "settings": settings_here,
                "bound": _bound(out / name / "run"),
                "scores": _probed(run, _asked(VARIANTS[name], tasks), scenes, head_epochs, seed),
                "grounding": _grounded(run, scenes, seed) if VARIANTS[name].has_critic else None,
                "train_seconds": trained - began,
                "probe_seconds": time.monotonic() - trained,
            }
            write_atomically(out / name / RESULT, json.dumps(kept, indent=2, allow_nan=False).encode())
        results[name] = kept
        shown = (f"{task} {100 * _stands(outcome):.1f}" for task, outcome in kept["scores"].items())
        say(f"{name}: " + ", ".join(shown))
        write_atomically(out / f"{TABLE}.json", json.dumps(results, indent=2, allow_nan=False).encode())
        write_atomically(out / f"{TABLE}.md", f"{to_markdown(results, tasks)}\n".encode())
    return results


def to_markdown(results: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """A row a variant, the score that stands for each task in per cent, the best of each in bold."""
    outcomes = {
        task: [each["scores"][task] for each in results.values() if task in each["scores"]] for task in tasks
    }
    outcomes = {task: found for task, found in outcomes.items() if found}
    heads = [f"{task}, {found[0]['metric'].replace('_', ' ')}" for task, found in outcomes.items()]
    heads += ["grounding, pointing", "times the best constant", "nats"]
    lines = [f"| variant | {' | '.join(heads)} |", f"|---|{'--:|' * len(heads)}"]
    best = {task: max(map(_stands, found)) for task, found in outcomes.items()}
    for name, result in results.items():
        cells = []
        for task in outcomes:
            if task not in result["scores"]:
                cells.append("–")
                continue
            value = _stands(result["scores"][task])
            shown = f"{100 * value:.1f}"
            cells.append(f"**{shown}**" if value == best[task] else shown)
        found, bound = result["grounding"], result["bound"]
        cells.append("–" if found is None else f"{100 * found['pointing']:.1f}")
        cells.append("–" if found is None else f"{found['times_constant']:.2f}")
        cells.append("–" if bound is None else f"{bound:.2f}")
        lines.append(f"| {VARIANTS[name].words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Carry out `jrl ablate`.

    Args:
        arguments: those after `jrl ablate`.

    Returns:
        0.

    Raises:
        FileNotFoundError: there is no such configuration.
        ValueError: an option is out of range.
    """
    options = _parser().parse_args(list(arguments))
    path = Path(options.config)
    if not path.is_file():
        raise FileNotFoundError(f"config: no file {path}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a configuration: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(config).__name__}")
    variants, tasks = (
        [name.strip() for name in text.split(",") if name.strip()]
        for text in (options.variants, options.tasks)
    )
    results = ablate(
        config,
        Path(options.out),
        variants,
        tasks,
        epochs=options.epochs,
        scenes=options.scenes,
        head_epochs=options.head_epochs,
        minutes=options.minutes,
        seed=options.seed,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if results:
        print(to_markdown(results, tasks))
    print(f"saved {options.out}")
    return 0


def _known(variants: Sequence[str]) -> list[str]:
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not variants or len(set(variants)) < len(variants):
        raise ValueError(
            f"variants: expected some of {', '.join(VARIANTS)}, each once, got {', '.join(variants)}"
        )
    return list(variants)


def _kept(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = kept["settings"] == settings
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result of this command: {error!r}") from error
    if not same:
        raise ValueError(f"{path}: holds the result of other settings; name another folder with --out")
    return kept


def _trained(values: dict[str, Any], folder: Path, trained: bool) -> Run:
    """The run in a folder, trained as far as it is not."""
    from jrl.training.command import run_command

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "variant.yaml"
    text = yaml.safe_dump(values)
    last = folder / "run" / "checkpoints" / "last.ckpt"
    if last.is_file() and (not file.is_file() or file.read_text(encoding="utf-8") != text):
        raise ValueError(f"{folder}: holds a training with other settings; name another folder with --out")
    write_atomically(file, text.encode())
    if not trained:
        return _untrained(values, folder / "run")
    run = ["--run", str(folder / "run")]
    # the command prints a table of its own
    with contextlib.redirect_stdout(sys.stderr):
        run_command(["fit", "--config", str(file), *run, "--resume", str(last.is_file()).lower()])
        run_command(["validate", "--config", str(folder / "run" / "config.yaml"), *run])
    return Run.load(folder / "run")


def _untrained(values: Mapping[str, Any], folder: Path) -> Run:
    """A run with fresh weights: its system, and the tokenizer and preprocessing of the data."""
    from jsonargparse import ArgumentParser

    from jrl.systems import System
    from jrl.training.data import CaptionDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(System, "system")
    parser.add_class_arguments(CaptionDataModule, "data")
    torch.manual_seed(values["seed_everything"])
    given = parser.parse_object({"system": values["model"]["system"], "data": values["data"]})
    built = parser.instantiate_classes(given)
    built.data.setup("fit")
    built.system.save_pretrained(folder / "model")
    built.data.save_preprocessing(folder / "model")
    return Run.load(folder)


def _asked(variant: Variant, tasks: Sequence[str]) -> list[str]:
    """Those tasks that have a meaning: nothing joins pictures and captions where no critic was trained."""
    return [task for task in tasks if variant.has_critic or task != RETRIEVAL]


def _probed(
    run: Run, tasks: Sequence[str], scenes: int, head_epochs: int | None, seed: int
) -> dict[str, dict[str, Any]]:
    if not tasks:
        return {}
    data = scene_parts(run.transform, train=scenes, val=scenes // 4, test=scenes // 4, seed=seed)
    outcomes = probe(run, data, list(tasks), epochs=head_epochs, seed=seed)
    return {
        name: {"metric": outcome.metric, "scores": outcome.scores, "baseline": outcome.baseline}
        for name, outcome in outcomes.items()
    }


def _grounded(run: Run, scenes: int, seed: int) -> dict[str, float]:
    """Pointing accuracy, and how many times that of the best constant pointer it is."""
    parts = scene_parts(run.transform, train=scenes // 4, val=2, test=scenes // 4, seed=seed)
    train, test = (scene_examples(parts[name].samples, run.transform.size) for name in ("train", "test"))
    found = ground(run, test, train=train)
    return {"pointing": found.scores[SYSTEM]["pointing"], "times_constant": found.times_constant}


def _bound(run: Path) -> float | None:
    """Nats of held-out pairs at the last layer, on the first validation part; None without a trained critic."""
    file = run / "validate.json"
    if not file.is_file():
        return None
    parts: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
    return next((part["bound_last"] for part in parts.values() if "bound_last" in part), None)


def _stands(outcome: Mapping[str, Any]) -> float:
    return float(outcome["scores"][outcome["metric"]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jrl ablate",
        description="Train variants of the mutual-information system on scenes and probe each, into one table.",
    )
    parser.add_argument("--config", default="configs/mutual_information_scenes.yaml", help="of `jrl fit`")
    parser.add_argument(
        "--out", default="runs/ablation", help="folder; what lies there already is not done again"
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"some of {','.join(VARIANTS)} (all)")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"some of {','.join(TASKS)} (all)")
    parser.add_argument("--epochs", type=int, help="of each training; those of the configuration otherwise")
    parser.add_argument("--scenes", type=int, default=2000, help="for the heads to train on (2000)")
    parser.add_argument("--head-epochs", type=int, help="of each head; the task's own number otherwise")
    parser.add_argument("--minutes", type=float, help="start no further variant after so many")
    parser.add_argument("--seed", type=int, default=0)
    return parser
