"""Phrases with boxes from a file of the user, one caption a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jrl.data.images import load_image
from jrl.data.readers.common import NOT_UTF8, FormatError, existing_file, text_lines
from jrl.data.sample import SkipReport
from jrl.grounding.candidates import Box
from jrl.grounding.examples import Example, TruePhrase

# annotations that count pixels from 1 run over the edge by one
_OVER = 1.0
NO_BOX = "phrase without a box"
NO_PHRASE = "caption without a phrase that has a box"


def read_entities(path: str | Path) -> tuple[list[Example], SkipReport]:
    """Read JSON lines of a picture, a caption, and the boxes of its phrases, as in Flickr30k Entities.

        {"image": "1.jpg", "caption": "A dog runs.", "phrases": [{"start": 0, "end": 5, "boxes": [[x0, y0, x1, y1]]}]}

    `start` and `end` count characters of the caption, `end` being the one after the last; boxes are in pixels of the
    picture, turned upright, and may run over its edge by one pixel, which is cut off. "proposals" on a line, a list
    of boxes, are ranked in place of the boxes of its phrases and the anchors. Other keys are left alone.

    Args:
        path: the file, plain or gzip; names of pictures are relative to its folder.

    Returns:
        The captions that have a phrase with a box, and the account of the phrases and captions that have none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is malformed, its picture missing or unreadable, a phrase outside its caption or a box
            outside its picture; the message begins with file and line. Or no line is left.
    """
    path = existing_file(path, "entities")
    skips = SkipReport()
    sizes: dict[Path, tuple[int, int]] = {}
    found = []
    for number, line in text_lines(path, skips):
        try:
            example = _example(line, path, number, sizes, skips)
        except ValueError as error:
            raise FormatError(f"{path}:{number}: {error}") from error
        if example is not None:
            found.append(example)
    if skips.counts[NOT_UTF8]:
        raise FormatError(f"{NOT_UTF8}: {skips.examples[NOT_UTF8][0]}")
    skips.raise_if_empty(len(found), path)
    return found, skips


def _example(
    line: str, path: Path, number: int, sizes: dict[Path, tuple[int, int]], skips: SkipReport
) -> Example | None:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"expected a JSON object, got {_kind(entry)}")
    name, caption = _text(entry, "image"), _text(entry, "caption")
    image = path.parent / name
    if image not in sizes:
        sizes[image] = load_image(image, name="image").size
    size = sizes[image]
    phrases = []
    for place, value in enumerate(_list(entry, "phrases")):
        phrase = _phrase(value, f"phrases[{place}]", caption, size)
        if phrase.boxes:
            phrases.append(phrase)
        else:
            skips.note(NO_BOX, f"{path}:{number}: {caption[phrase.start : phrase.end]!r}")
    if not phrases:
        skips.add(NO_PHRASE, f"{path}:{number}: {caption!r}")
        return None
    proposals = None
    if entry.get("proposals") is not None:
        values = _list(entry, "proposals")
        if not values:
            raise ValueError("proposals: expected at least one box, got none")
        proposals = tuple(_box(box, f"proposals[{place}]", size) for place, box in enumerate(values))
    named = dict.fromkeys(box for phrase in phrases for box in phrase.boxes)
    return Example(
        f"{path}:{number}",
        image,
        size,
        caption,
        tuple(phrases),
        tuple(named) if proposals is None else proposals,
        anchors=proposals is None,
    )


def _phrase(value: Any, where: str, caption: str, size: tuple[int, int]) -> TruePhrase:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with start, end and boxes, got {_kind(value)}")
    start, end = (_place(value, key, where) for key in ("start", "end"))
    if not 0 <= start < end <= len(caption):
        raise ValueError(
            f"{where}: expected 0 <= start < end <= {len(caption)}, the length of the caption, got {start} to {end}"
        )
    if not caption[start:end].strip():
        raise ValueError(f"{where}: expected words from {start} to {end}, got {caption[start:end]!r}")
    boxes = [_box(box, f"{where}.boxes[{i}]", size) for i, box in enumerate(_list(value, "boxes", where))]
    return TruePhrase(start, end, tuple(boxes))


def _box(value: Any, where: str, size: tuple[int, int]) -> Box:
    if not isinstance(value, list) or len(value) != 4 or not all(_is_number(number) for number in value):
        raise ValueError(f"{where}: expected four numbers x0, y0, x1, y1, got {json.dumps(value)[:60]}")
    x0, y0, x1, y1 = (float(number) for number in value)
    width, height = size
    if min(x0, y0) < -_OVER or x1 > width + _OVER or y1 > height + _OVER:
        raise ValueError(f"{where}: {value} lies outside of the picture, which is {width}x{height}")
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"{where}: expected x0 < x1 and y0 < y1 inside the picture, got {value}")
    return x0, y0, x1, y1


def _is_number(value: Any) -> bool:
    # false for NaN too
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9


def _text(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: expected a text, got {_kind(value)}")
    return value


def _list(entry: dict[str, Any], key: str, where: str = "") -> list[Any]:
    value = entry.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{f'{where}.' if where else ''}{key}: expected a list, got {_kind(value)}")
    return value


def _place(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}.{key}: expected a whole number, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == "" else f"{type(value).__name__} {json.dumps(value)[:60]}"
