"""Questions about generated scenes, and the one right answer of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jrl.data.sample import Sample, SceneObject
from jrl.data.scenes_drawing import COLOURS, SHAPES

KINDS = ("how many", "which colour", "is there", "where")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: one of KINDS.
        text: what is asked.
        answer: a number, a colour, "yes", "no" or a shape.
    """

    kind: str
    text: str
    answer: str


class _Draws:
    # random() is the one method of Random whose stream Python promises to keep from version to version.
    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self._random() * len(options))]

    def chance(self, share: float) -> bool:
        return self._random() < share


def ask(sample: Sample) -> list[Question]:
    """One question of each kind that the scene can answer without doubt; a pure function of the scene and its key.

    Half of the questions "how many" and "is there" name what the picture shows. The others of "is there" join a
    colour and a shape that it does show, though not together, where there are such: nobody who looks for the one
    alone can tell.

    Args:
        sample: a scene whose objects have a shape as the label and a colour among their attributes.

    Returns:
        Up to four questions, in the order of KINDS.
    """
    draws = _Draws(f"questions/{sample.key}")
    makers: tuple[Callable[[Sample, _Draws], Question | None], ...] = (_count, _colour, _exists, _relation)
    return [question for maker in makers if (question := maker(sample, draws)) is not None]


def _count(sample: Sample, draws: _Draws) -> Question:
    shown = [thing.label for thing in sample.objects]
    shape = draws.pick(shown) if shown and draws.chance(0.5) else draws.pick(SHAPES)
    return Question(KINDS[0], f"how many {_plural(shape)} are there", str(shown.count(shape)))


def _colour(sample: Sample, draws: _Draws) -> Question | None:
    once = [thing for thing in sample.objects if _only(sample, thing.label, "")]
    if not once:
        return None
    shape = draws.pick([thing.label for thing in once])
    thing = next(thing for thing in once if thing.label == shape)
    return Question(KINDS[1], f"what colour is the {shape}", colour_of(thing))


def _exists(sample: Sample, draws: _Draws) -> Question:
    shown = sorted({(colour_of(thing), thing.label) for thing in sample.objects})
    named = [f"{colour} {shape}" for colour, shape in shown]
    if named and draws.chance(0.5):
        return Question(KINDS[2], f"is there {_article(draws.pick(named))}", "yes")
    mixed = sorted({f"{c} {s}" for c, _ in shown for _, s in shown} - set(named))
    every = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    absent = mixed or [pair for pair in every if pair not in named]
    return Question(KINDS[2], f"is there {_article(draws.pick(absent))}", "no")


def _relation(sample: Sample, draws: _Draws) -> Question | None:
    found = list(_relations(sample))
    if not found:
        return None
    text = draws.pick(sorted(found_text for found_text, _ in found))
    return Question(KINDS[3], text, dict(found)[text])


def _relations(sample: Sample) -> Iterator[tuple[str, str]]:
    for ground, thing in enumerate(sample.objects):
        if not _only(sample, thing.label, colour_of(thing)):
            continue
        for relation in sorted({name for _, name, to in sample.relations if to == ground}):
            subjects = [a for a, name, to in sample.relations if to == ground and name == relation]
            if len(subjects) == 1:
                text = f"what is {relation} the {colour_of(thing)} {thing.label}"
                yield text, sample.objects[subjects[0]].label


def _only(sample: Sample, shape: str, colour: str) -> bool:
    like = [t for t in sample.objects if t.label == shape and (not colour or colour_of(t) == colour)]
    return len(like) == 1


def colour_of(thing: SceneObject) -> str:
    """The colour among the attributes of an object.

    Raises:
        ValueError: it has none.
    """
    for word in thing.attributes:
        if word in COLOURS:
            return word
    raise ValueError(
        f"object {thing.label!r}: expected a colour among its attributes, got {thing.attributes}"
    )


def _article(pair: str) -> str:
    return f"{'an' if pair[0] in 'aeiou' else 'a'} {pair}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"
