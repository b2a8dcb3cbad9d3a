"""`jrl segment-report`: zero-shot segmentation of the scenes of a run, beside trivial answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jrl.data.sample import Sample
from jrl.evaluation.scene_segmentation import (
    BACKGROUND_TEXTS,
    Scenes,
    labelled,
    predict,
    report,
    scene_names,
    to_markdown,
)
from jrl.training.files import check_folder, write_atomically
from jrl.training.run import Run


def main(arguments: Sequence[str]) -> int:
    """Choose the background's weight on a run's validation scenes, score its test scenes, and write JSON, a table and pictures.

    Args:
        arguments: those after `jrl segment-report`.

    Returns:
        0.

    Raises:
        FileNotFoundError: there is no such run.
        TypeError: the system segments nothing.
        ValueError: the run was not trained on generated scenes, or an option does not fit.
    """
    options = _parser().parse_args(list(arguments))
    if options.examples < 1:
        raise ValueError(f"examples: expected at least 1, got {options.examples}")
    if not options.template or any("{}" not in template for template in options.template):
        raise ValueError(f"template: expected '{{}}' where the name goes, got {options.template}")

    from jrl.downstream.probe import random_twin
    from jrl.grounding.segment_pictures import save_segmentations
    from jrl.training.command import data_module_of

    out = check_folder("out", options.out or Path(options.run) / "segment-report")
    run = Run.load(options.run, device=options.device, allow_pickle=options.allow_pickle)
    system: Any = run.system
    if not hasattr(system, "segment") or not hasattr(system, "group_maps"):
        raise TypeError(f"run: {type(system).__name__} does not segment; expected a GroupViT")
    data = data_module_of(options.run)
    if data.dataset != "scenes":
        raise ValueError(
            f"run: expected one trained on 'scenes', whose masks are known, got {data.dataset!r}"
        )
    data.setup("test")
    missing = [part for part in ("val", "test") if part not in data.parts]
    if missing:
        raise ValueError(f"run: its scenes have no part {', '.join(missing)}")
    names = scene_names([sample for part in data.parts for sample in data.samples(part)])
    parts = {
        part: _scenes(run, data.samples(part), names)
        for part in ("val", "test", "test_compositional")
        if part in data.parts
    }
    twin = Run(random_twin(run.system, options.seed), run.tokenizer, run.transform, run.max_length)
    texts, twin_texts = (_texts(each, names, options.template) for each in (run, twin))
    print(f"{len(names)} classes and the background", file=sys.stderr)
    found = report(system, texts, twin.system, twin_texts, parts["val"], parts, seed=options.seed)  # type: ignore[arg-type]
    first = parts["test"]
    shown = Scenes(first.pixels[: options.examples], first.truth[: options.examples], first.names)
    (prediction,) = predict(system, shown.pixels, texts, (found["background_weight"],))
    values = {"run": str(options.run), "templates": options.template, "seed": options.seed, **found}
    write_atomically(out / "segment-report.json", json.dumps(values, indent=2, allow_nan=False).encode())
    write_atomically(out / "segment-report.md", f"{to_markdown(found)}\n".encode())
    pictures = [run.transform.to_image(each) for each in shown.pixels]
    save_segmentations(
        pictures, shown, prediction, system.group_maps(shown.pixels), out / "segment-report.png"
    )
    print(to_markdown(found))
    for part, result in found["parts"].items():
        print(f"{part}: {result['times_trivial']:.1f} times the mIoU of the best trivial answer")
    print(f"saved {out}")
    return 0


def _scenes(run: Run, samples: Sequence[Sample], names: Sequence[str]) -> Scenes:
    from jrl.data.images import load_image

    pixels = [run.transform(load_image(sample.image, name=sample.key)) for sample in samples]
    scenes = labelled(samples, torch.stack(pixels), names)
    return Scenes(scenes.pixels.to(run.device), scenes.truth, scenes.names)


def _texts(run: Run, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Unit vectors of the classes' texts; that of a name is the mean over the templates."""
    backgrounds = run.encode_texts(BACKGROUND_TEXTS)
    each = [run.encode_texts([template.replace("{}", name) for name in names]) for template in templates]
    mean = torch.nn.functional.normalize(torch.stack(each).mean(dim=0), dim=-1)
    return torch.cat([backgrounds, mean]).to(run.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jrl segment-report",
        description="Zero-shot segmentation of the test scenes of a run that was trained on generated scenes: mean "
        "intersection over union over the pairs of colour and shape and the background, beside trivial answers.",
    )
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument("--out", help="folder of the results; RUN/segment-report otherwise")
    parser.add_argument(
        "--template",
        nargs="+",
        default=["{}"],
        help="texts of a class whose mean stands for it, with {} for its name ({})",
    )
    parser.add_argument("--examples", type=int, default=8, help="pictures to show (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the random groups and weights (0)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-pickle", action="store_true", help="take pickled weights")
    return parser
