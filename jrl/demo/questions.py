"""What the trained system is asked beside retrieval: zero-shot classes, and queries in free words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jrl.data.sample import Sample


@dataclass(frozen=True)
class Classification:
    """One zero-shot classification; a picture takes part when it has one of the classes.

    Attributes:
        name: what is told apart.
        classes: the words that go into the templates.
        templates: prompts with "{}" where the class goes.
        label: class of a picture; None when it has none of them, or several.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    label: Callable[[Sample], str | None]


QUERIES = {
    "emoji": (
        "a red flag",
        "smiling cat",
        "woman with red hair",
        "musical instrument",
        "sad face",
        "red fruit",
        "cook with dark skin",
        "blaues Herz",
    ),
    "scenes": (
        "a red circle",
        "a green star",
        "two blue shapes",
        "a small yellow square",
        "a striped circle",
        "a black background",
        "a triangle inside a circle",
        "a pink heart above a square",
    ),
}

TEST_PARTS = {
    "emoji": {
        "test_compositional": "new combinations",
        "test_unseen": "unseen concepts",
    },
    "scenes": {
        "test": "new scenes",
        "test_compositional": "new combinations",
    },
}

_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_SECOND = ("second skin tone", "second gender", "adults", "children")


def classifications(data: str) -> tuple[Classification, ...]:
    """The zero-shot classifications of a dataset."""
    if data == "emoji":
        people = ("person", "woman", "man", "hand")
        return (
            Classification(
                "skin tone",
                _TONES,
                ("{} skin tone", *(f"{who} {{}} skin tone" for who in people)),
                lambda sample: _attribute(sample, "skin tone", _TONES),
            ),
            Classification(
                "gender",
                ("woman", "man"),
                ("{}", *(f"{{}} {tone} skin tone" for tone in _TONES)),
                lambda sample: _attribute(sample, "gender", ("woman", "man")),
            ),
        )
    from jrl.data.scenes_drawing import COLOURS, SHAPES

    return (
        Classification(
            "colour of a lone shape",
            tuple(COLOURS),
            tuple(f"a {{}} {shape}" for shape in SHAPES),
            lambda sample: _lone(sample, "colour", tuple(COLOURS)),
        ),
        Classification(
            "lone shape",
            SHAPES,
            tuple(f"a {colour} {{}}" for colour in COLOURS),
            lambda sample: _lone(sample, "shape", SHAPES),
        ),
    )


def _attribute(sample: Sample, name: str, classes: Sequence[str]) -> str | None:
    attributes = sample.metadata["attributes"]
    value = attributes.get(name)
    alone = not any(other in attributes for other in _SECOND)
    return value if alone and value in classes else None


def _lone(sample: Sample, what: str, classes: Sequence[str]) -> str | None:
    if len(sample.objects) != 1:
        return None
    thing = sample.objects[0]
    words = [thing.label] if what == "shape" else list(thing.attributes)
    found = [word for word in words if word in classes]
    return found[0] if len(found) == 1 else None
