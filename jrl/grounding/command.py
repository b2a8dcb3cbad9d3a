"""`jrl ground`: where a run finds the phrases of captions, on generated scenes or the user's own pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jrl.training.files import check_folder, write_atomically
from jrl.training.run import Run

_EXAMPLES = 8


def main(arguments: Sequence[str]) -> int:
    """Score the grounding of a run and write `ground.json`, `ground.md` and `ground.png`, or show one picture's words.

    Args:
        arguments: those after `jrl ground`.

    Returns:
        0.

    Raises:
        FileNotFoundError: there is no such run, file or picture.
        TypeError: the system cannot ground words.
        ValueError: an option or the user's file does not fit.
    """
    options = _parser().parse_args(list(arguments))
    if (options.image is None) != (options.caption is None):
        raise ValueError("image, caption: expected both or neither")
    if options.image is not None and options.entities is not None:
        raise ValueError("image, entities: choose one")
    if options.caption is not None and not options.caption.strip():
        raise ValueError("caption: expected words, got a blank text")
    if options.scenes < 8:
        raise ValueError(f"scenes: expected at least 8, got {options.scenes}")
    if options.seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {options.seed}")
    out = check_folder("out", options.out or Path(options.run) / "ground")
    run = Run.load(options.run, device=options.device, allow_pickle=options.allow_pickle)
    if options.image is not None:
        return _show(run, options.image, options.caption, out)
    return _measure(run, options, out)


def _measure(run: Run, options: argparse.Namespace, out: Path) -> int:
    from rich.console import Console

    from jrl.downstream.scenes import scene_parts
    from jrl.grounding.attention import grounder
    from jrl.grounding.entities import read_entities
    from jrl.grounding.evaluate import ground
    from jrl.grounding.examples import scene_examples
    from jrl.grounding.pictures import phrase_strips, save_strips
    from jrl.grounding.report import to_json, to_markdown, to_table

    # before the pictures are read
    system = grounder(run.system)
    values: dict[str, Any] = {"run": str(options.run), "system": type(run.system).__name__}
    train = None
    if options.entities is not None:
        examples, skips = read_entities(options.entities)
        values["entities"] = str(options.entities)
    else:
        skips = None
        parts = scene_parts(
            run.transform,
            train=options.scenes,
            val=2,
            test=options.scenes,
            max_objects=options.max_objects,
            seed=options.seed,
        )
        train, examples = (
            scene_examples(parts[name].samples, run.transform.size) for name in ("train", "test")
        )
        values |= {"scenes": options.scenes, "max_objects": options.max_objects}
    found = ground(
        run,
        examples,
        train=train,
        against_random=options.against_random,
        seed=options.seed,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if skips is not None:
        found.skips.merge(skips)
    if found.skips.counts or found.skips.notes:
        print(found.skips.summary(), file=sys.stderr)
    # before anything is written, so that a failure leaves no half of the results
    step = max(len(examples) // _EXAMPLES, 1)
    strips = phrase_strips(run, system, examples[::step][:_EXAMPLES])
    values |= {"seed": options.seed, "image_size": run.transform.size, **to_json(found)}
    write_atomically(out / "ground.json", json.dumps(values, indent=2, allow_nan=False).encode())
    write_atomically(out / "ground.md", f"{to_markdown(found)}\n".encode())
    save_strips(strips, out / "ground.png")
    console = Console()
    console.print(to_table(found, f"{options.run}, {found.phrases} phrases, per cent"))
    console.print(
        f"points right {found.times_constant:.2f} times as often as the best pointer that sees no picture"
    )
    console.print(f"saved {out}", soft_wrap=True)
    return 0


def _show(run: Run, image: str, caption: str, out: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from jrl.data.images import load_image
    from jrl.grounding.attention import attend, grounder
    from jrl.grounding.pictures import save_strips, word_strip, words_of

    system = grounder(run.system)
    picture = load_image(image, name="image")
    (maps,) = attend(run, system, [picture], [caption])
    words = words_of(maps, *picture.size)
    path = out / f"{Path(image).stem}.png"
    save_strips([word_strip(maps, words, picture)], path)
    table = Table("word", "highest at x, y", "attention there", title=image)
    for word in words:
        # many ties say nothing of a place
        points = "; ".join(f"{x:.0f}, {y:.0f}" for x, y in word.points[:3])
        more = f" and {len(word.points) - 3} more" if len(word.points) > 3 else ""
        row = (f"{points}{more}", f"{100 * word.share:.1f} %") if word.points else ("behind the cut", "")
        table.add_row(word.text, *row)
    console = Console()
    console.print(table)
    console.print(f"saved {path}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jrl ground",
        description="Find the phrases of captions in their pictures by the attention of a run, on generated scenes, on "
        "a file of phrases with boxes, or the words of one caption in one picture.",
    )
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument(
        "--scenes",
        type=int,
        default=500,
        help="to test on (500); as many others choose the best constant cell",
    )
    parser.add_argument("--max-objects", type=int, default=4, help="shapes in a scene, 1 to 4 (4)")
    parser.add_argument(
        "--entities",
        metavar="FILE",
        help='JSON lines {"image", "caption", "phrases": [{"start", "end", "boxes"}]} in place of scenes',
    )
    parser.add_argument("--image", metavar="FILE", help="one picture, with --caption")
    parser.add_argument("--caption", help="what to look for in --image")
    parser.add_argument(
        "--against-random", action="store_true", help="also measure the same system with random weights"
    )
    parser.add_argument("--out", help="folder of the results; RUN/ground otherwise")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the random weights (0)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-pickle", action="store_true", help="take pickled weights")
    return parser
