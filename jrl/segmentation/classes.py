"""Classes by their names: which there are, and the vectors of their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from jrl.data.readers.masks import BACKGROUND, IGNORED
from jrl.systems import GroupViT
from jrl.training.run import Run

BACKGROUNDS = ("threshold", "text")
PLAIN, PHOTO = "{}", "a photo of a {}."
_SAME = 1 - 1e-6  # cosine above which two texts are the same to the system


@dataclass(frozen=True)
class Classes:
    """What the pixels of a picture are told apart into.

    The number of a class in an index mask is its place in `names`; the background is 0 whether it was asked for or not.

    Attributes:
        names: "background", then the others.
        vectors: [C, D] unit vectors of the others, or of all of them where `background` is "text".
        background: what it is decided by: "threshold", "text", or None for no background.
    """

    names: tuple[str, ...]
    vectors: Tensor
    background: str | None


def parse_names(text: str) -> list[str]:
    """Class names from "red circle, blue square".

    Raises:
        ValueError: there is none, one is blank, or one occurs twice.
    """
    names = [" ".join(name.split()) for name in text.split(",")]
    if not any(names):
        raise ValueError(
            'classes: expected names separated by commas, such as "red circle, blue square", got none'
        )
    if not all(names):
        raise ValueError(f"classes: expected a name between every two commas, got {text!r}")
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            raise ValueError(f"classes: {name!r} occurs twice")
        seen.add(name.lower())
    return names


def split_background(names: Sequence[str]) -> tuple[list[str], bool]:
    """The names without "background", and whether it was among them."""
    others = [name for name in names if name.lower() != BACKGROUND]
    return others, len(others) < len(names)


def encode_classes(
    run: Run, system: GroupViT, names: Sequence[str], background: str | None, templates: Sequence[str]
) -> Classes:
    """Embed the texts of classes.

    Args:
        run: whose tokenizer it is.
        system: of the run.
        names: without the background.
        background: see `Classes`.
        templates: with "{}" where the name goes; a class is the mean of them.

    Raises:
        ValueError: no name but the background's, too many, one class under a threshold, a template without "{}", or texts that
            are one to the run.
    """
    if not names:
        raise ValueError("classes: expected at least one besides the background")
    if len(names) >= IGNORED:
        raise ValueError(f"classes: expected at most {IGNORED - 1} besides the background, got {len(names)}")
    if background == "threshold" and len(names) == 1:
        raise ValueError(
            f"classes: the only class {names[0]!r} has a share of 1 among the classes at every pixel, so no threshold finds the "
            "background; give it a text (--background text), or name more classes"
        )
    texts = [BACKGROUND, *names] if background == "text" else list(names)
    vectors = system.zero_shot_classifier(texts, templates, run.tokenizer)
    alike = (vectors @ vectors.T).fill_diagonal_(-1.0) > _SAME
    if alike.any():
        first, second = alike.nonzero()[0].tolist()
        raise ValueError(
            f"classes: {texts[first]!r} and {texts[second]!r} are the same text to this run; perhaps it cuts both short"
        )
    return Classes((BACKGROUND, *names), vectors, background)
