"""`jrl segment`: the classes of every pixel of pictures, or the score of a run on a dataset."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from jrl.data.sample import Sample
from jrl.segmentation.classes import (
    BACKGROUNDS,
    PHOTO,
    PLAIN,
    Classes,
    encode_classes,
    parse_names,
    split_background,
)
from jrl.segmentation.evaluate import PROTOCOLS
from jrl.segmentation.segment import Options, Segmented
from jrl.systems import GroupViT
from jrl.systems.group_vit_segmentation import MODES
from jrl.training.files import check_folder, write_atomically
from jrl.training.run import Run, image_files

_THRESHOLD = 0.95
_EXAMPLES = 8
_BACKGROUND_HELP = """background:
  "background" among the classes means the pixels that are none of the others. By default (--background threshold) it has no
  text: a pixel is background where its best class scores below --threshold. A score lies in [0, 1] and is lower the more
  classes there are and the less sure the run is, so look for the value that suits yours; the group that the run is surest of
  is never background, though it may have no pixel. With --background text it is a class like the others, by its text; so it
  is in --mode patent, whose scores are cosines. Without "background" or one of these options every pixel gets one of the classes.
"""


def main(arguments: Sequence[str]) -> int:
    """Segment pictures and write what was found, or score a dataset and write `segment.json`, `segment.md` and a few pictures.

    Args:
        arguments: those after `jrl segment`.

    Returns:
        0.

    Raises:
        FileNotFoundError: there is no such run, picture or dataset.
        TypeError: the system does not segment.
        ValueError: an option does not fit.
    """
    options = _parser().parse_args(list(arguments))
    _check(options)
    files = [] if options.dataset else _pictures(options.image)
    out = check_folder("out", options.out or Path(options.run) / "segment")
    run = Run.load(options.run, device=options.device, allow_pickle=options.allow_pickle)
    system = run.system
    if not isinstance(system, GroupViT):
        raise TypeError(f"run: {options.run} holds a {type(system).__name__}, and only a GroupViT segments")
    if options.dataset:
        return _measure(run, system, options, out)
    return _show(run, system, options, files, out)


def _show(run: Run, system: GroupViT, options: argparse.Namespace, files: list[Path], out: Path) -> int:
    from rich.console import Console

    from jrl.data.images import ImageError, load_image
    from jrl.data.sample import SkipReport
    from jrl.segmentation.pictures import save_mask, save_overlay, save_stages
    from jrl.segmentation.report import picture_json, picture_table
    from jrl.segmentation.segment import segment

    names, wanted = split_background(parse_names(options.classes))
    wanted = wanted or options.threshold is not None or options.background is not None
    classes = _classes(run, system, options, names, wanted, PLAIN)
    look = _look(options, classes, run.transform.size, None, None, _THRESHOLD)
    console, skips = Console(), SkipReport()
    found_all: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    for path, stem in zip(files, _stems(files), strict=True):
        try:
            picture = load_image(path)
        except ImageError as error:
            skips.add(error.reason, str(error))
            continue
        found = segment(run, system, picture, classes, look)
        written = {"mask": f"{stem}.mask.png", "overlay": f"{stem}.overlay.png"}
        save_mask(found.index, out / written["mask"])
        save_overlay(picture, found, out / written["overlay"])
        if options.stages:
            written["stages"] = f"{stem}.stages.png"
            save_stages(run, system, picture, look.size, out / written["stages"])
        found_all.append(picture_json(str(path), picture.size, written, found))
        console.print(picture_table(str(path), found))
    skips.raise_if_empty(len(found_all), "image")
    if skips.skipped:
        print(skips.summary(), file=sys.stderr)
    values = {**_settings(options, classes, look), "pictures": found_all}
    write_atomically(out / "segment.json", json.dumps(values, indent=2, allow_nan=False).encode())
    console.print(f"saved {out}", soft_wrap=True)
    return 0


def _measure(run: Run, system: GroupViT, options: argparse.Namespace, out: Path) -> int:
    from rich.console import Console

    from jrl.data.readers import SEGMENTATION_FORMATS
    from jrl.segmentation.evaluate import evaluate
    from jrl.segmentation.pictures import save_overlay
    from jrl.segmentation.report import score_json, score_line, score_markdown, score_table

    split = {} if options.split is None else {"split": options.split}
    data = SEGMENTATION_FORMATS[options.dataset](options.root, **split)
    if data.samples.skips.skipped or data.samples.skips.notes:
        print(data.samples.skips.summary(), file=sys.stderr)
    names = list(data.classes[1:])
    if options.classes is not None:
        names, _ = split_background(parse_names(options.classes))
        if len(names) != len(data.classes) - 1:
            raise ValueError(
                f"classes: expected other texts for the {len(data.classes) - 1} classes of {options.dataset} in their order, "
                f"got {len(names)}"
            )
    classes = _classes(run, system, options, names, True, PHOTO)
    protocol, side = PROTOCOLS[options.dataset], run.transform.size
    look = _look(
        options,
        classes,
        protocol.size * side,
        protocol.size * side,
        protocol.stride * side,
        protocol.threshold,
    )
    count = len(data.samples) if options.limit is None else min(options.limit, len(data.samples))
    step = max(count // _EXAMPLES, 1)

    def watch(number: int, sample: Sample, picture: PIL.Image.Image, found: Segmented) -> None:
        if number % step == 0 and number // step < _EXAMPLES:
            truth = sample.load_mask()
            path = out / f"{Path(sample.key).stem}.overlay.png"
            save_overlay(picture, found, path, truth=None if truth is None else (truth, classes.names))

    found = evaluate(
        run,
        system,
        data,
        classes,
        look,
        limit=options.limit,
        watch=watch,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if found.skips.skipped:
        print(found.skips.summary(), file=sys.stderr)
    values = {
        **_settings(options, classes, look),
        "dataset": options.dataset,
        "root": str(options.root),
        "split": data.samples[0].split,
        **score_json(found),
    }
    write_atomically(out / "segment.json", json.dumps(values, indent=2, allow_nan=False).encode())
    write_atomically(out / "segment.md", f"{score_markdown(found)}\n".encode())
    console = Console()
    console.print(score_table(f"{options.run} on {data.samples.name}, {found.pictures} pictures", found))
    console.print(score_line(found))
    console.print(f"saved {out}", soft_wrap=True)
    return 0


def _classes(
    run: Run, system: GroupViT, options: argparse.Namespace, names: list[str], wanted: bool, template: str
) -> Classes:
    background = None
    if wanted:
        background = options.background or ("text" if options.mode == "patent" else "threshold")
    return encode_classes(run, system, names, background, options.template or [template])


def _look(
    options: argparse.Namespace,
    classes: Classes,
    size: int,
    window: int | None,
    stride: int | None,
    threshold: float,
) -> Options:
    """What the user said, and otherwise what is given here."""
    if options.window is not None or options.size is not None:
        # another size is looked at as a whole unless windows are asked for
        window, stride = options.window, None
    if classes.background != "threshold":
        chosen = None
    else:
        chosen = threshold if options.threshold is None else options.threshold
    return Options(
        size=size if options.size is None else options.size,
        mode=options.mode,
        top_k=options.top_k or None,
        threshold=chosen,
        window=window,
        stride=stride if options.stride is None else options.stride,
    )


def _settings(options: argparse.Namespace, classes: Classes, look: Options) -> dict[str, Any]:
    return {
        "run": str(options.run),
        "names": list(classes.names),
        "background": classes.background,
        "templates": options.template or [PHOTO if options.dataset else PLAIN],
        **vars(look),
    }


def _check(options: argparse.Namespace) -> None:
    if options.dataset:
        if options.root is None:
            raise ValueError("root: expected the folder of the dataset")
        if options.image or options.stages:
            raise ValueError("dataset: takes neither pictures nor --stages")
    else:
        for name in ("root", "split", "limit"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name}: has a meaning only with --dataset")
        if options.classes is None:
            raise ValueError(
                'classes: expected names separated by commas, such as --classes "red circle, blue square"'
            )
        if not options.image:
            raise ValueError("image: expected at least one picture, or --dataset")
    if options.mode == "patent" and (options.threshold is not None or options.background == "threshold"):
        raise ValueError(
            "threshold: mode 'patent' has cosines and no threshold; there the background is a text"
        )
    if options.background == "text" and options.threshold is not None:
        raise ValueError("threshold: has no meaning with --background text")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise ValueError(f"threshold: expected a value in [0, 1], got {options.threshold}")
    if options.top_k < 0:
        raise ValueError(f"top-k: expected at least 1, or 0 for all, got {options.top_k}")
    for name in ("size", "window", "stride", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if (
        options.stride is not None
        and options.window is None
        and (options.size is not None or not options.dataset)
    ):
        raise ValueError("stride: has a meaning only with --window")


def _pictures(given: Sequence[str]) -> list[Path]:
    """The files that were named, and those in the folders that were."""
    files: list[Path] = []
    for name in given:
        if not Path(name).exists():
            raise FileNotFoundError(f"image: {name}: no such file")
        files += image_files(name) if Path(name).is_dir() else [Path(name)]
    return files


def _stems(files: Sequence[Path]) -> list[str]:
    """A name of its own for each file: the second "cat" is "cat-2"."""
    stems: list[str] = []
    for path in files:
        stem, count = path.stem, 1
        while stem in stems:
            count += 1
            stem = f"{path.stem}-{count}"
        stems.append(stem)
    return stems


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jrl segment",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Give every pixel of pictures one of the classes you name, by a GroupViT that was trained on captions, or\n"
        "score it on a dataset with the class of every pixel. For each picture: NAME.mask.png (class numbers in VOC's\n"
        "colours, 0 for background), NAME.overlay.png with a legend, and its scores in segment.json. For a dataset: the scores\n"
        "in segment.json and segment.md, and an overlay beside the truth of a few pictures.",
        epilog=_BACKGROUND_HELP,
    )
    parser.add_argument("--run", required=True, help="folder of a run of GroupViT")
    parser.add_argument("image", nargs="*", metavar="IMAGE", help="pictures, or folders of them; of any size")
    parser.add_argument(
        "--classes",
        metavar='"A, B, background"',
        help="names separated by commas; with --dataset, other texts for its classes in their order",
    )
    parser.add_argument("--background", choices=BACKGROUNDS, help="see below")
    parser.add_argument(
        "--threshold",
        type=float,
        help=f"score below which a pixel is background ({_THRESHOLD}; for datasets as published: "
        + ", ".join(f"{protocol.threshold} {name}" for name, protocol in PROTOCOLS.items())
        + ")",
    )
    parser.add_argument(
        "--top-k", type=int, default=5, help="only the so many classes nearest to a picture (5); 0 for all"
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="scores as in the published code (default) or the patent",
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help=f'text around a name, repeatable: a class is the mean of its texts ("{PLAIN}"; with --dataset "{PHOTO}")',
    )
    parser.add_argument(
        "--size",
        type=int,
        help="pixels of the short side that a picture is resized to (that of the training; with --dataset twice that)",
    )
    parser.add_argument(
        "--window",
        type=int,
        help="side of windows that slide over it (none; with --dataset, and no --size, twice the training's)",
    )
    parser.add_argument("--stride", type=int, help="pixels from one window to the next (half a window)")
    parser.add_argument(
        "--stages",
        action="store_true",
        help="also NAME.stages.png: the groups of each stage, of the picture as a whole",
    )
    parser.add_argument(
        "--dataset", choices=sorted(PROTOCOLS), help="score on its pictures in place of IMAGE"
    )
    parser.add_argument("--root", help="folder of the dataset")
    parser.add_argument("--split", help="of the dataset (val, val2017)")
    parser.add_argument("--limit", type=int, help="score its first so many pictures")
    parser.add_argument("--out", help="folder of the results; RUN/segment otherwise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-pickle", action="store_true", help="take pickled weights")
    return parser
