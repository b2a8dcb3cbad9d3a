"""Generated scenes: shapes with colours, sizes, textures and relations, and captions true of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from jrl.data.sample import Phrase, Sample, SampleSet, SceneObject
from jrl.data.scenes_drawing import (
    BACKGROUNDS,
    COLOURS,
    ROOM_INSIDE,
    SHAPES,
    TEXTURES,
    Shape,
    draw_mask,
    draw_scene,
)
from jrl.data.scenes_grammar import LANGUAGES, NounPhrase, describe, relate

RADII = {"small": (0.085, 0.105), "medium": (0.135, 0.155), "large": (0.2, 0.225)}
MAX_OBJECTS = 4
_GAP = 0.015  # between two shapes, and to the edge
_INSIDE_SHARE = 0.25  # of the scenes with two or more shapes
_PLACEMENTS = 60
_INVERSE = {"left of": "right of", "above": "below"}

Pair = tuple[str, str]


@dataclass(frozen=True)
class Scene:
    """The shapes of one scene, back to front, and its background."""

    shapes: tuple[Shape, ...]
    background: str

    def relations(self) -> list[tuple[int, str, int]]:
        """Every relation that holds between two shapes, judged by their boxes."""
        boxes = [shape.box() for shape in self.shapes]
        found = []
        for i, a in enumerate(boxes):
            for j, b in enumerate(boxes):
                if i == j:
                    continue
                if b[0] < a[0] and b[1] < a[1] and a[2] < b[2] and a[3] < b[3]:
                    found.append((i, "inside", j))
                for name, near, far in (("left of", 0, 2), ("above", 1, 3)):
                    if a[far] <= b[near]:
                        found.extend([(i, name, j), (j, _INVERSE[name], i)])
        return sorted(found)


@dataclass(frozen=True)
class ScenePicture:
    """Draws a scene when called."""

    scene: Scene
    side: int

    def __call__(self) -> Image.Image:
        return draw_scene(self.scene.shapes, self.scene.background, self.side)


@dataclass(frozen=True)
class SceneMask:
    """Draws the mask of a scene when called."""

    scene: Scene
    side: int

    def __call__(self) -> np.ndarray:
        return draw_mask(self.scene.shapes, self.side)


class _Draws:
    # random() is the one method of Random whose stream Python promises to keep from version to version.
    def __init__(self, seed: int, index: int) -> None:
        self._random = random.Random(f"{seed}/{index}").random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self._random() * len(options))]

    def count(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def chance(self, share: float) -> bool:
        return self._random() < share


def held_out_pairs(count: int, seed: int = 0) -> frozenset[Pair]:
    """(colour, shape) pairs to keep out of training; every colour and every shape stays in other pairs.

    Args:
        count: how many, at most one a shape.
        seed: another seed, other pairs.

    Returns:
        The pairs, no two with the same colour or the same shape.

    Raises:
        ValueError: ``count`` out of range.
    """
    most = min(len(SHAPES), len(COLOURS))
    if not 0 <= count <= most:
        raise ValueError(f"held_out: expected 0 to {most} pairs, got {count}")
    draws = _Draws(seed, -1)
    shapes, colours = list(SHAPES), list(COLOURS)
    pairs = set()
    for _ in range(count):
        shape, colour = draws.pick(shapes), draws.pick(colours)
        shapes.remove(shape)
        colours.remove(colour)
        pairs.add((colour, shape))
    return frozenset(pairs)


def make_scene(
    seed: int,
    index: int,
    *,
    max_objects: int = MAX_OBJECTS,
    avoid: frozenset[Pair] = frozenset(),
    include: frozenset[Pair] = frozenset(),
) -> Scene:
    """One scene, a pure function of its arguments.

    Args:
        seed: of the dataset.
        index: of the scene, 0 or more.
        max_objects: 1 to 4.
        avoid: (colour, shape) pairs that must not occur.
        include: pairs of which the first shape must be one; ignored when empty.

    Returns:
        The scene: shapes that do not overlap, save for one that may lie whole inside another.

    Raises:
        ValueError: ``max_objects`` or ``index`` out of range.
    """
    if not 1 <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"max_objects: expected 1 to {MAX_OBJECTS}, got {max_objects}")
    if index < 0:
        raise ValueError(f"index: expected 0 or more, got {index}")
    draws = _Draws(seed, index)
    count = draws.count(1, max_objects)
    shapes: list[Shape] = []
    if count > 1 and draws.chance(_INSIDE_SHARE):
        shapes.extend(_nested(draws, avoid, include))
    wanted_first = include if not shapes else frozenset()
    while len(shapes) < count:
        placed = _place(draws, shapes, avoid, wanted_first)
        if placed is None:
            break
        shapes.append(placed)
        wanted_first = frozenset()
    return Scene(tuple(shapes), draws.pick(tuple(BACKGROUNDS)))


def _kind(draws: _Draws, avoid: frozenset[Pair], include: frozenset[Pair], shapes: Sequence[str]) -> Pair:
    wanted = sorted(pair for pair in include if pair[1] in shapes)
    if wanted:
        return wanted[draws.count(0, len(wanted) - 1)]
    while True:
        pair = draws.pick(tuple(COLOURS)), draws.pick(shapes)
        if pair not in avoid:
            return pair


def _place(
    draws: _Draws, others: Sequence[Shape], avoid: frozenset[Pair], include: frozenset[Pair]
) -> Shape | None:
    colour, shape = _kind(draws, avoid, include, SHAPES)
    texture = draws.pick(TEXTURES)
    for attempt in range(_PLACEMENTS):
        # A crowded picture has room for small shapes only.
        size = draws.pick(tuple(RADII)) if attempt < _PLACEMENTS // 2 else "small"
        radius = draws.between(*RADII[size])
        edge = radius + _GAP
        candidate = Shape(
            shape,
            colour,
            size,
            texture,
            draws.between(edge, 1 - edge),
            draws.between(edge, 1 - edge),
            radius,
            draws.between(-0.15, 0.15),
        )
        if all(_apart(candidate, other) for other in others):
            return candidate
    return None


def _apart(a: Shape, b: Shape) -> bool:
    distance = ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5
    return distance >= a.radius + b.radius + _GAP


def _nested(draws: _Draws, avoid: frozenset[Pair], include: frozenset[Pair]) -> list[Shape]:
    colour, shape = _kind(draws, avoid, frozenset(), tuple(ROOM_INSIDE))
    radius = draws.between(*RADII["large"])
    edge = radius + _GAP
    x, y = draws.between(edge, 1 - edge), draws.between(edge, 1 - edge)
    # A pattern on the outer shape would hide the outline of the inner one.
    outer = Shape(shape, colour, "large", "plain", x, y, radius, draws.between(-0.15, 0.15))
    while True:
        inner_colour, inner_shape = _kind(draws, avoid, include, SHAPES)
        if inner_colour != colour:
            break
        if include:
            other = next(c for c in COLOURS if c != inner_colour and (c, shape) not in avoid)
            outer = replace(outer, colour=other)
            break
    inner_radius = min(draws.between(*RADII["small"]), radius * ROOM_INSIDE[shape])
    inner = Shape(
        inner_shape,
        inner_colour,
        "small",
        draws.pick(TEXTURES),
        x,
        y,
        inner_radius,
        draws.between(-0.15, 0.15),
    )
    return [outer, inner]


def read_scenes(
    *,
    train: int = 4000,
    val: int = 500,
    test: int = 500,
    test_compositional: int = 500,
    size: int = 64,
    seed: int = 0,
    languages: Sequence[str] = LANGUAGES,
    max_objects: int = MAX_OBJECTS,
    held_out: int = 4,
) -> SampleSet:
    """A dataset of generated scenes with captions, boxes, masks, relations and phrase-to-region links.

    Splits: "train", "val", "test", and "test_compositional", each of whose scenes shows a pair of colour and
    shape that no other split holds, though each colour and each shape occurs there. Each scene has, in each
    language, one caption that lists all its shapes and, where two are related, one that says how.
    Scene i is a pure function of the arguments and i; pictures and masks are drawn when they are opened.

    Args:
        train, val, test, test_compositional: scenes in each split.
        size: side of the pictures in pixels.
        seed: of the scenes and of the pairs held out.
        languages: some of "en", "de", "fr", "es".
        max_objects: 1 to 4 shapes in a scene.
        held_out: pairs of colour and shape kept for "test_compositional".

    Returns:
        The samples, in the order of the splits above.

    Raises:
        ValueError: a count, size or language out of range, or a compositional part without pairs held out.
    """
    counts = {"train": train, "val": val, "test": test, "test_compositional": test_compositional}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
        if count < 0:
            raise ValueError(f"{name}: expected 0 or more scenes, got {count}")
    if not sum(counts.values()):
        raise ValueError("train, val, test, test_compositional: expected at least one scene in all, got none")
    if not 16 <= size <= 1024:
        raise ValueError(f"size: expected 16 to 1024 pixels, got {size}")
    if not languages or any(language not in LANGUAGES for language in languages):
        raise ValueError(f"languages: expected some of {', '.join(LANGUAGES)}, got {list(languages)}")
    pairs = held_out_pairs(held_out, seed)
    if test_compositional and not pairs:
        raise ValueError("held_out: expected at least 1 for a test_compositional part, got 0")
    samples: list[Sample] = []
    for split, count in counts.items():
        only_here = split == "test_compositional"
        for _ in range(count):
            index = len(samples)
            scene = make_scene(
                seed,
                index,
                max_objects=max_objects,
                avoid=frozenset() if only_here else pairs,
                include=pairs if only_here else frozenset(),
            )
            samples.append(_sample(scene, index, seed, split, size, languages))
    return SampleSet(samples, name="scenes")


def _sample(scene: Scene, index: int, seed: int, split: str, size: int, languages: Sequence[str]) -> Sample:
    said = [_phrase(shape) for shape in scene.shapes]
    relations = scene.relations()
    # A stream of its own: adding a language or a caption must not change the picture.
    draws = _Draws(seed + 1_000_003, index)
    background = scene.background if draws.chance(0.5) else ""
    chosen = relations[draws.count(0, len(relations) - 1)] if relations else None
    short = [_shorten(phrase, draws) for phrase in said]

    captions: list[str] = []
    codes: list[str] = []
    phrases: list[Phrase] = []
    for language in languages:
        sentences = [(describe(language, said, background), tuple(range(len(said))))]
        if chosen is not None:
            i, name, j = chosen
            sentences.append((relate(language, short[i], name, short[j]), (i, j)))
        for caption, objects in sentences:
            for (start, end), target in zip(caption.spans, objects, strict=True):
                phrases.append(Phrase(len(captions), start, end, (target,)))
            captions.append(caption.text)
            codes.append(language)
    objects_ = [
        SceneObject(
            shape.shape,
            (shape.size, shape.texture, shape.colour),
            (box[0] * size, box[1] * size, box[2] * size, box[3] * size),
            number,
        )
        for number, shape in enumerate(scene.shapes, start=1)
        for box in [shape.box()]
    ]
    return Sample(
        key=f"scene-{seed}-{index:06d}",
        image=ScenePicture(scene, size),
        captions=captions,
        languages=codes,
        tags=sorted({word for shape in scene.shapes for word in (shape.colour, shape.shape)}),
        split=split,
        objects=objects_,
        relations=relations,
        mask=SceneMask(scene, size),
        phrases=phrases,
        metadata={"background": scene.background},
    )


def _phrase(shape: Shape) -> NounPhrase:
    return NounPhrase(
        shape.shape,
        shape.colour,
        "" if shape.size == "medium" else shape.size,
        "" if shape.texture == "plain" else shape.texture,
    )


def _shorten(phrase: NounPhrase, draws: _Draws) -> NounPhrase:
    return NounPhrase(
        phrase.shape,
        phrase.colour,
        phrase.size if draws.chance(0.5) else "",
        phrase.texture if draws.chance(0.5) else "",
    )
