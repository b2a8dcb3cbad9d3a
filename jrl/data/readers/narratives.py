"""Localized Narratives: long spoken captions with the mouse trace that pointed at what was said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jrl.data.readers.common import (
    BAD_ROW,
    NO_CAPTION,
    ImageFolder,
    existing_file,
    recognise,
    text_lines,
    wrong_format,
)
from jrl.data.sample import Sample, SampleSet, SkipReport, TimedWord

_EXPECTED = "Localized Narratives JSONL"
BAD_TRACE = "broken trace or timed caption dropped"


@dataclass
class _Gathered:
    where: str
    dataset: str
    captions: list[str] = field(default_factory=list)
    traces: list[list[np.ndarray]] = field(default_factory=list)
    timed_words: list[list[TimedWord]] = field(default_factory=list)
    annotators: list[Any] = field(default_factory=list)


def read_localized_narratives(
    annotations: str | Path | Sequence[str | Path],
    images: str | Path,
    *,
    file_name: Callable[[dict[str, Any]], str] | None = None,
    split: str = "",
    language: str = "en",
) -> SampleSet:
    """Read Localized Narratives; the narratives of several annotators of one picture become its captions.

    Args:
        annotations: one or more files of JSON lines (shards), plain or gzip.
        images: the folder of pictures.
        file_name: from an annotation to the picture's relative name. By default `image_id` with .jpg or .png,
            also in twelve digits and as `COCO_{train,val}2014_...`, the names that COCO gives.
        split: what to call the split.
        language: code of the captions' language.
    Returns:
        Samples keyed by `image_id`, with `traces` and `timed_words` a caption.
    Raises:
        FileNotFoundError: a file or the folder is missing.
        FormatError: a file is not of this format; the message says which it looks like.
        ValueError: no picture has both a file and a caption.
    """
    paths = [annotations] if isinstance(annotations, (str, Path)) else list(annotations)
    if not paths:
        raise ValueError("annotations must name at least one file, got none")
    folder, skips = ImageFolder(images), SkipReport()
    gathered: dict[str, tuple[_Gathered, dict[str, Any]]] = {}
    for path in [existing_file(path, "annotations") for path in paths]:
        _read_file(path, gathered, skips)
    samples = []
    for image_id, (entry, first) in gathered.items():
        names = [file_name(first)] if file_name is not None else _names(image_id)
        found = folder.find_or_skip(skips, entry.where, *names)
        if found is None:
            continue
        samples.append(
            Sample(
                key=image_id,
                image=found,
                captions=entry.captions,
                languages=[language] * len(entry.captions),
                split=split,
                traces=entry.traces,
                timed_words=entry.timed_words,
                metadata={"dataset_id": entry.dataset, "annotator_ids": entry.annotators},
            )
        )
    name = Path(paths[0]).name.split(".")[0]
    skips.raise_if_empty(len(samples), paths[0] if len(paths) == 1 else f"{len(paths)} files")
    return SampleSet(samples, name=name, skips=skips)


def _read_file(path: Path, gathered: dict[str, tuple[_Gathered, dict[str, Any]]], skips: SkipReport) -> None:
    understood = False
    for number, line in text_lines(path, skips):
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            skips.add(BAD_ROW, f"{where}: {error}")
            continue
        if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
            skips.add(BAD_ROW, f"{where}: lacks 'image_id' or 'caption'")
            continue
        understood = True
        caption = entry["caption"]
        if not isinstance(caption, str) or not caption.strip():
            skips.add(NO_CAPTION, where)
            continue
        image_id = str(entry["image_id"])
        own, _ = gathered.setdefault(
            image_id, (_Gathered(where, str(entry.get("dataset_id", ""))), _without_traces(entry))
        )
        own.captions.append(caption.strip())
        own.annotators.append(entry.get("annotator_id"))
        try:
            strokes, words = _strokes(entry.get("traces")), _words(entry.get("timed_caption"))
        except (KeyError, TypeError, ValueError) as error:
            skips.note(BAD_TRACE, f"{where}: {type(error).__name__}: {error}")
            strokes, words = [], []
        own.traces.append(strokes)
        own.timed_words.append(words)
    if not understood:
        found = recognise(path)
        if found is not None and not found.startswith(_EXPECTED):
            raise wrong_format(path, _EXPECTED, "no line holds 'image_id' and 'caption'")


def _without_traces(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("traces", "timed_caption")}


def _strokes(traces: Any) -> list[np.ndarray]:
    strokes = []
    for stroke in traces or []:
        points = np.array([(point["x"], point["y"], point["t"]) for point in stroke], dtype=np.float32)
        if points.size and not np.isfinite(points).all():
            raise ValueError("a point of the trace is not finite")
        strokes.append(points.reshape(-1, 3))
    return strokes


def _words(timed_caption: Any) -> list[TimedWord]:
    words = []
    for entry in timed_caption or []:
        start, end = float(entry["start_time"]), float(entry["end_time"])
        if not (math.isfinite(start) and math.isfinite(end)):
            raise ValueError("a time of the timed caption is not finite")
        words.append(TimedWord(str(entry["utterance"]), start, end))
    return words


def _names(image_id: str) -> list[str]:
    stems = [image_id]
    if image_id.isdecimal():
        padded = f"{int(image_id):012d}"
        stems += [padded, f"COCO_train2014_{padded}", f"COCO_val2014_{padded}"]
    return [stem + suffix for stem in stems for suffix in (".jpg", ".png")]
