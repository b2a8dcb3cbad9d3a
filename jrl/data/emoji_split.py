"""An honest split of the emoji: combinations never seen together, and concepts never seen at all."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jrl.data.emoji_concepts import Concept

TRAIN = "train"
HELD_OUT = "held_out"
PARTS = ("test_compositional", "test_unseen", "val_compositional", "val_unseen")

# Root-mean-square distance of the 16x16 thumbnails (0 to 1) under which two pictures count as nearly the
# same: below it lie pairs such as a cloud and a cloud with rain, or two flags of equal stripes.
NEAR_DUPLICATE = 0.05
# Larger groups (all the police officers) stay in training: they are what teaches the attributes.
LARGEST_UNSEEN_GROUP = 6


@dataclass(frozen=True)
class SplitSizes:
    """Pictures in each test and validation part."""

    test_compositional: int = 300
    test_unseen: int = 150
    val_compositional: int = 150
    val_unseen: int = 75

    def __post_init__(self) -> None:
        for part in PARTS:
            count = getattr(self, part)
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{part}: expected an int, got {type(count).__name__}")
            if count < 0:
                raise ValueError(f"{part}: expected a count of at least 0, got {count}")


def split_emoji(
    concepts: Mapping[str, Concept],
    thumbnails: np.ndarray,
    *,
    seed: int = 0,
    sizes: SplitSizes | None = None,
    never_test: Sequence[str] = (),
) -> dict[str, str]:
    """Part of every emoji: train, a test or validation part, or held out.

    - ``*_unseen``: one picture from each of so many concept groups, all of whose pictures leave training (the
      others are ``held_out``); no picture of another group is nearly the same.
    - ``*_compositional``: the base concept and every attribute value are in training, this combination is
      not; at least half of the pictures of each base concept stay in training.

    The order in which candidates are drawn is a hash of the seed and the emoji, hence the same everywhere.

    Args:
        concepts: concept of each emoji, complete attributes (``fill_defaults``).
        thumbnails: [N, H, W, 3] uint8, in the order of ``concepts``.
        seed: another seed, another split.
        sizes: pictures in each part.
        never_test: emoji kept out of every test and validation part, such as one of several drawn alike.

    Returns:
        The name of the part of each emoji.

    Raises:
        ValueError: fewer candidates than a part needs, or thumbnails of another shape.
    """
    sizes = sizes or SplitSizes()
    if thumbnails.ndim != 4 or len(thumbnails) != len(concepts):
        raise ValueError(f"thumbnails: expected [{len(concepts)}, H, W, 3], got {list(thumbnails.shape)}")
    sequences = sorted(concepts, key=lambda s: hashlib.sha256(f"{seed} {s}".encode()).digest())
    barred = set(never_test)
    groups: dict[str, list[str]] = defaultdict(list)
    for sequence in concepts:
        groups[concepts[sequence].base].append(sequence)

    parts = dict.fromkeys(concepts, TRAIN)
    lonely = _groups_alone(concepts, thumbnails)
    unseen = [
        base
        for base in dict.fromkeys(concepts[s].base for s in sequences)
        if len(groups[base]) <= LARGEST_UNSEEN_GROUP and base in lonely and not barred & set(groups[base])
    ]
    taken = 0
    for part in ("test_unseen", "val_unseen"):
        wanted = getattr(sizes, part)
        chosen = unseen[taken : taken + wanted]
        _require(part, wanted, len(chosen), "concept groups")
        taken += wanted
        for base in chosen:
            for sequence in groups[base]:
                parts[sequence] = HELD_OUT
            parts[min(groups[base], key=lambda s: (len(s), s))] = part

    # Counted after the draw above: what left training with a concept group no longer counts as seen.
    in_training = Counter(concepts[s].base for s in concepts if parts[s] == TRAIN)
    original = dict(in_training)
    values = Counter(v for s in concepts if parts[s] == TRAIN for v in concepts[s].attributes)
    combinations = Counter(concept.key for concept in concepts.values())
    pool = [
        s
        for s in sequences
        if parts[s] == TRAIN
        and s not in barred
        and concepts[s].attributes
        and combinations[concepts[s].key] == 1
    ]
    for part in ("test_compositional", "val_compositional"):
        wanted = getattr(sizes, part)
        drawn = 0
        for sequence in pool:
            if drawn == wanted:
                break
            concept = concepts[sequence]
            enough_left = in_training[concept.base] - 1 >= max(1, original[concept.base] / 2)
            if parts[sequence] != TRAIN or not enough_left or any(values[v] < 2 for v in concept.attributes):
                continue
            parts[sequence] = part
            in_training[concept.base] -= 1
            values.subtract(concept.attributes)
            drawn += 1
        _require(part, wanted, drawn, "pictures")
    return parts


def _require(part: str, wanted: int, found: int, what: str) -> None:
    if found < wanted:
        raise ValueError(f"{part}: expected {wanted} {what}, but the emoji given allow only {found}")


def _groups_alone(concepts: Mapping[str, Concept], thumbnails: np.ndarray) -> set[str]:
    """Base concepts none of whose pictures is nearly the same as a picture of another base concept."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32) / 255
    bases = [concept.base for concept in concepts.values()]
    numbers = {base: i for i, base in enumerate(dict.fromkeys(bases))}
    group = np.array([numbers[base] for base in bases])
    squares = (flat**2).sum(axis=1)
    crowded: set[int] = set()
    for start in range(0, len(flat), 512):
        rows = slice(start, start + 512)
        distance = squares[rows, None] + squares[None] - 2 * flat[rows] @ flat.T
        near = (distance < NEAR_DUPLICATE**2 * flat.shape[1]) & (group[rows, None] != group[None])
        crowded.update(group[rows][near.any(axis=1)].tolist())
    return {base for base, number in numbers.items() if number not in crowded}
