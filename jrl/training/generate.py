"""`jrl generate`: pictures of descriptions by a trained run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from jrl.data.images import save_image
from jrl.training.command import run_at_checkpoint
from jrl.training.drawing import draw, to_picture
from jrl.training.files import check_folder
from jrl.training.run import Run, picture_grid

ANIMATIONS = {"gif": 100, "webp": 1000}
"""Formats of films, and the frames a second that each can count: hundredths or thousandths of a second."""


def main(arguments: Sequence[str]) -> int:
    """Carry out `jrl generate`.

    Args:
        arguments: those after the command's name.

    Returns:
        0.

    Raises:
        FileNotFoundError: the run, its checkpoint or the file of descriptions is missing.
        ValueError: an argument is out of range, or the run's system does not generate pictures.
    """
    options = _parser().parse_args(arguments)
    if bool(options.texts) == (options.file is not None):
        raise ValueError("texts, file: give descriptions, or --file with one a line")
    texts = list(options.texts) if options.file is None else _lines(Path(options.file))
    count = options.n if options.n is not None else 8 if options.file is None else 1
    for name, value, least in (("n", count, 1), ("seed", options.seed, 0), ("size", options.size, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    most = ANIMATIONS[options.animation]
    if not 0 < options.fps <= most:
        raise ValueError(
            f"fps: expected more than 0 and at most {most} for {options.animation}, got {options.fps}"
        )
    out = check_folder("out", options.out or Path(options.run) / "generated")
    if options.checkpoint is None:
        run = Run.load(options.run, device=options.device)
    else:
        run = run_at_checkpoint(options.run, options.checkpoint, device=options.device)
    _say_what_is_cut(run, texts)
    drawn = draw(
        run.system,
        run.tokenizer,
        texts,
        max_length=run.max_length,
        count=count,
        seed=options.seed,
        averaged=not options.latest,
    )
    pictures = [[_enlarged(to_picture(one), options.size) for one in row] for row in drawn]
    out.mkdir(parents=True, exist_ok=True)
    if options.file is None:
        for place, row in enumerate(pictures):
            for k, picture in enumerate(row):
                save_image(picture, out / f"text{place:03d}-{k:03d}.png")
    else:
        # those of another film would look like this one's
        for old in out.iterdir():
            if re.fullmatch(r"frames\d*(-\d{4,}\.png|\.gif|\.webp)", old.name):
                old.unlink()
        # picture k of every description has one noise: each film shows one noise through all descriptions
        for k in range(count):
            frames = [row[k] for row in pictures]
            name = "frames" if count == 1 else f"frames{k:03d}"
            for place, frame in enumerate(frames):
                save_image(frame, out / f"{name}-{place:04d}.png")
            save_image(
                frames[0],
                out / f"{name}.{options.animation}",
                save_all=True,
                append_images=frames[1:],
                duration=round(1000 / options.fps),
                loop=0,
            )
    side = max(pictures[0][0].size)
    grid = picture_grid(
        [one for row in pictures for one in row], columns=count, side=side, gap=max(2, side // 16)
    )
    save_image(grid, out / "grid.png")
    print(f"{out}: {len(texts)} x {count} pictures of {drawn.shape[-1]} pixels, and grid.png")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jrl generate",
        description="Draw pictures of descriptions; the same seed draws the same pictures.",
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="descriptions")
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument("--file", help="descriptions, one a line: numbered frames and an animation of them")
    parser.add_argument("--n", type=int, help="pictures a description; 8, with --file 1, otherwise")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", help="folder for the pictures; RUN/generated otherwise")
    parser.add_argument(
        "--checkpoint", help="draw with this checkpoint of the run, not with its exported system"
    )
    parser.add_argument("--latest", action="store_true", help="the latest weights, not their moving average")
    parser.add_argument("--size", type=int, default=1, help="enlarge each pixel to this many a side")
    parser.add_argument("--animation", choices=ANIMATIONS, default="gif", help="format of the animation")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second of the animation")
    parser.add_argument("--device", default="cpu")
    return parser


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"file: no such file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"file: {path} is not UTF-8 text: {error}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"file: {path} holds no description")
    return texts


def _say_what_is_cut(run: Run, texts: Sequence[str]) -> None:
    for text in texts:
        length = len(run.tokenizer(text)["input_ids"])
        if length > run.max_length:
            print(
                f"jrl: only the first {run.max_length} of {length} tokens are drawn of: {text}",
                file=sys.stderr,
            )


def _enlarged(picture: PIL.Image.Image, factor: int) -> PIL.Image.Image:
    if factor == 1:
        return picture
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, PIL.Image.Resampling.NEAREST)
