"""Semantic object accuracy: whether a detector finds the objects that a text names in the picture made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ObjectClass:
    """What texts call a class of objects.

    Attributes:
        name: of the class.
        words: what names it, as whole words, such as "dog" and "puppy"; its name when empty.
        excluding: what does not name it though it holds one of the words, such as "hot dog".
    """

    name: str
    words: tuple[str, ...] = ()
    excluding: tuple[str, ...] = ()


@dataclass(frozen=True)
class ObjectAccuracy:
    """How often named objects are found.

    Attributes:
        soa_c: mean over the classes of the share of pictures that show them when asked to.
        soa_i: share over all pairs of a picture and a class that its text names.
        unnamed: share over the other pairs of classes that some text names: what a detector finds though nobody asked for it,
            which both shares hold by accident too; 0 where there is no such pair.
        by_class: of each class that a text names.
        counts: pictures whose text names the class.
    """

    soa_c: float
    soa_i: float
    unnamed: float
    by_class: dict[str, float]
    counts: dict[str, int]


def named_objects(texts: Sequence[str], classes: Sequence[ObjectClass]) -> Tensor:
    """Which texts name which classes.

    Words match whole and in any case; a plural or a synonym is a word of its own.

    Returns:
        [len(texts), len(classes)] bool.

    Raises:
        ValueError: no class, or a blank word.
    """
    if not classes:
        raise ValueError("classes: expected at least one, got none")
    wanted = [(_pattern(one.words or (one.name,)), one.excluding) for one in classes]
    unwanted = [_pattern(words) if words else None for _, words in wanted]
    rows = []
    for text in texts:
        row = []
        for (pattern, _), excluded in zip(wanted, unwanted, strict=True):
            left = text if excluded is None else excluded.sub(" | ", text)
            row.append(pattern.search(left) is not None)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.bool).reshape(len(texts), len(classes))


def object_accuracy(found: Tensor, named: Tensor, names: Sequence[str]) -> ObjectAccuracy:
    """SOA-C and SOA-I (Hinz et al. 2020).

        SOA-C = 1/|C| Σ_c 1/|I_c| Σ_{i in I_c} found_ic,    SOA-I = Σ_c Σ_{i in I_c} found_ic / Σ_c |I_c|

    with I_c the pictures whose texts name class c. Classes that no text names are left out.

    Args:
        found: [N, C] bool, the detector finds class c in picture i.
        named: [N, C] bool, text i names class c.
        names: of the C classes.

    Raises:
        TypeError: `found` or `named` is not bool.
        ValueError: shapes that do not fit, or no text names a class.
    """
    for argument, values in (("found", found), ("named", named)):
        if values.dtype != torch.bool:
            raise TypeError(f"{argument}: expected bool, got {values.dtype}")
    if found.shape != named.shape or found.ndim != 2 or found.shape[1] != len(names):
        raise ValueError(
            f"found, named: expected [N, {len(names)}] both, got {list(found.shape)}, {list(named.shape)}"
        )
    counts, hits = named.sum(dim=0), (found & named).sum(dim=0)
    if not int(counts.sum()):
        raise ValueError("named: expected texts that name a class, got none that does")
    others = ~named & (counts > 0)
    shares = {
        name: int(hit) / int(count)
        for name, hit, count in zip(names, hits, counts, strict=True)
        if int(count)
    }
    return ObjectAccuracy(
        sum(shares.values()) / len(shares),
        int(hits.sum()) / int(counts.sum()),
        int((found & others).sum()) / max(1, int(others.sum())),
        shares,
        {name: int(count) for name, count in zip(names, counts, strict=True) if int(count)},
    )


def best_scores(detections: Sequence[Mapping[str, Tensor]], classes: int) -> Tensor:
    """The score of the best box of each class in each picture; 0 where there is none.

    Args:
        detections: of each picture "scores" [K] and "labels" [K] int64, as the detectors of torchvision return them.
        classes: how many; labels below 0 or beyond are left out.

    Returns:
        [len(detections), classes] float.
    """
    best = torch.zeros(len(detections), classes)
    for row, found in zip(best, detections, strict=True):
        labels, scores = found["labels"].cpu(), found["scores"].float().cpu()
        known = (labels >= 0) & (labels < classes)
        row.scatter_reduce_(0, labels[known], scores[known], reduce="amax")
    return best


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    for word in words:
        if not word.strip():
            raise ValueError("words: expected a word, got a blank one")
    # whatever the white space between the words
    choices = "|".join(r"\s+".join(map(re.escape, word.split())) for word in words)
    return re.compile(rf"(?<!\w)(?:{choices})(?!\w)", re.IGNORECASE)
