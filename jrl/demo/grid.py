"""The picture of queries and what they find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from jrl.data.images import load_image, save_image
from jrl.data.sample import Sample
from jrl.training.data import CaptionDataModule

SIDE = 112
_GAP, _FRAME, _MARGIN, _COLUMNS = 14, 4, 36, 2
_TITLE, _HEADING, _ROW_GAP = 30, 58, 26
_INK, _SOFT, _RIGHT, _EDGE = "#111827", "#6b7280", "#16a34a", "#e5e7eb"


def pictures_of(source: CaptionDataModule, keys: Sequence[str]) -> dict[str, Image.Image]:
    """The pictures of a run by key, drawn larger than the system saw them.

    Args:
        source: the pictures of the run, read.
        keys: of the samples.

    Raises:
        ValueError: a key is not in the run's dataset.
    """
    wanted = set(keys)
    samples = {
        sample.key: sample for part in source.parts for sample in source.samples(part) if sample.key in wanted
    }
    missing = sorted(wanted - set(samples))
    if missing:
        raise ValueError(f"{source.dataset}: the dataset no longer has {missing[0]!r}; --fresh starts over")
    draw = _draw_emoji() if source.dataset == "emoji" else _draw_scene
    return {key: draw(samples[key]) for key in wanted}


def _draw_emoji() -> Any:
    from jrl.data.emoji_font import EmojiPainter, find_emoji_font

    painter = EmojiPainter(find_emoji_font())

    def draw(sample: Sample) -> Image.Image:
        picture = painter.paint(sample.metadata["emoji"])
        if isinstance(picture, str):
            raise ValueError(f"{sample.key}: {picture}")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")

    return draw


def _draw_scene(sample: Sample) -> Image.Image:
    from jrl.data.scenes import ScenePicture

    image = sample.image
    return load_image(replace(image, side=2 * SIDE) if isinstance(image, ScenePicture) else image)


def save_grid(
    sections: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]],
    pictures: Mapping[str, Image.Image],
    path: Path,
) -> None:
    """Draw the queries of each section in two columns, the right pictures framed.

    Args:
        sections: heading, what is searched, and queries as `evaluation.Query` has them.
        pictures: by key.
        path: of the PNG.
    """
    shown = max(len(query["found"]) for _, _, queries in sections for query in queries)
    block = shown * SIDE + (shown - 1) * _GAP
    row = _TITLE + SIDE + _ROW_GAP
    width = _COLUMNS * block + (_COLUMNS - 1) * 2 * _MARGIN + 2 * _MARGIN
    height = _MARGIN + sum(_HEADING + -(-len(queries) // _COLUMNS) * row for _, _, queries in sections)
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    top = _MARGIN // 2
    for heading, searched, queries in sections:
        pen.text((_MARGIN, top), heading, fill=_INK, font=_font(23, bold=True))
        after = _MARGIN + pen.textlength(heading, font=_font(23, bold=True)) + 14
        pen.text((after, top + 6), searched, fill=_SOFT, font=_font(17))
        top += _HEADING - 10
        for number, query in enumerate(queries):
            left = _MARGIN + number % _COLUMNS * (block + 2 * _MARGIN)
            _draw_query(canvas, pen, query, pictures, left, top + number // _COLUMNS * row, block)
        top += -(-len(queries) // _COLUMNS) * row + 10
    save_image(canvas.quantize(255, dither=Image.Dither.NONE), path, optimize=True)


def _draw_query(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    query: Mapping[str, Any],
    pictures: Mapping[str, Image.Image],
    left: int,
    top: int,
    width: int,
) -> None:
    note = ""
    if query["rank"] is not None and query["right"] not in query["found"]:
        note = f"rank {query['rank']}"
    room = width - (pen.textlength(note, font=_font(15)) + 12 if note else 0)
    text = _shorten(pen, f"“{query['text']}”", room)
    pen.text((left, top), text, fill=_INK, font=_font(17))
    if note:
        pen.text((left + width, top + 3), note, fill=_SOFT, font=_font(15), anchor="ra")
    top += _TITLE
    for number, key in enumerate(query["found"]):
        x = left + number * (SIDE + _GAP)
        right = key == query["right"]
        inner = SIDE - 2 * (_FRAME + 3)
        picture = pictures[key].resize((inner, inner), Image.Resampling.LANCZOS)
        canvas.paste(picture, (x + _FRAME + 3, top + _FRAME + 3))
        box = (x, top, x + SIDE - 1, top + SIDE - 1)
        pen.rounded_rectangle(box, 8, outline=_RIGHT if right else _EDGE, width=_FRAME if right else 1)


def _shorten(pen: ImageDraw.ImageDraw, text: str, room: float) -> str:
    if pen.textlength(text, font=_font(17)) <= room:
        return text
    while len(text) > 2 and pen.textlength(text + "…”", font=_font(17)) > room:
        text = text[:-1]
    return text.rstrip() + "…”"


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib brings these files, so they are the same on every machine
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)
