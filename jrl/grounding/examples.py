"""Captions whose phrases name boxes: from generated scenes, or from a file of the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jrl.data.sample import ImageSource, Sample
from jrl.grounding.candidates import Box


@dataclass(frozen=True)
class TruePhrase:
    """A phrase and where it is.

    Attributes:
        start, end: its characters in the caption.
        boxes: of what it names, in pixels of the picture; each of them is right.
        mask_ids: of what it names, in the mask.
    """

    start: int
    end: int
    boxes: tuple[Box, ...]
    mask_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Example:
    """A picture with one caption.

    Attributes:
        name: what to call it in messages.
        image: the picture.
        size: its width and height in pixels.
        caption: the text.
        phrases: of the caption.
        candidates: boxes to rank, in pixels of the picture.
        anchors: rank the windows of `jrl.grounding.anchors` too.
        mask: gives integers [H, W], in which the `mask_ids` of the phrases are found, or None.
    """

    name: str
    image: ImageSource
    size: tuple[int, int]
    caption: str
    phrases: tuple[TruePhrase, ...]
    candidates: tuple[Box, ...]
    anchors: bool = True
    mask: Callable[[], np.ndarray | None] = lambda: None


def scene_examples(samples: Sequence[Sample], side: int) -> list[Example]:
    """Every caption of generated scenes with its phrases; the boxes of all shapes of a scene are candidates.

    Phrases of one caption with the same words fit each other's objects as well, so any of them is right.

    Args:
        samples: scenes.
        side: of their pictures in pixels.

    Raises:
        ValueError: no caption has a phrase.
    """
    found = []
    for sample in samples:
        for number, caption in enumerate(sample.captions):
            own = [phrase for phrase in sample.phrases if phrase.caption == number]
            named: dict[str, list[int]] = {}
            for phrase in own:
                named.setdefault(caption[phrase.start : phrase.end], []).extend(phrase.objects)
            phrases = []
            for phrase in own:
                things = [sample.objects[i] for i in named[caption[phrase.start : phrase.end]]]
                ids = tuple(thing.mask_id for thing in things if thing.mask_id is not None)
                phrases.append(
                    TruePhrase(phrase.start, phrase.end, tuple(thing.box for thing in things), ids)
                )
            if phrases:
                boxes = tuple(thing.box for thing in sample.objects)
                name = f"{sample.key}, caption {number}"
                found.append(
                    Example(
                        name,
                        sample.image,
                        (side, side),
                        caption,
                        tuple(phrases),
                        boxes,
                        mask=sample.load_mask,
                    )
                )
    if not found:
        raise ValueError("samples: expected captions with phrases, got none")
    return found
