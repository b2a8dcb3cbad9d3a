"""R-precision: whether a generated picture is known by its text among others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RPrecision:
    """Share of pictures whose own text comes first.

    Attributes:
        precision: in [0, 1].
        mean_rank: of the own text, from 1.
        candidates: texts that each picture is compared with, its own among them; chance is one over it.
    """

    precision: float
    mean_rank: float
    candidates: int


def mismatched_texts(texts: Sequence[str], count: int, seed: int = 0) -> Tensor:
    """For each text, others that differ from it and from each other, drawn uniformly.

    Pictures may share a text; equal texts count once here, or a picture's own text would stand among the wrong ones.

    Args:
        texts: N texts.
        count: others of each.
        seed: 0 or more.

    Returns:
        [N, count] int64, places in `texts`.

    Raises:
        ValueError: fewer than `count` + 1 different texts, or a number out of range.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    places = {text: place for place, text in reversed(list(enumerate(texts)))}
    # in the order of their first occurrence
    different = sorted(places.values())
    number = {texts[place]: which for which, place in enumerate(different)}
    check_candidates(texts, count + 1)
    generator = np.random.default_rng(seed)
    first = np.array(different)
    rows = []
    for text in texts:
        drawn = generator.choice(len(different) - 1, size=count, replace=False)
        # leaves out the text itself
        rows.append(first[drawn + (drawn >= number[text])])
    return torch.from_numpy(np.stack(rows))


def check_candidates(texts: Sequence[str], candidates: int) -> None:
    """Refuse what `r_precision` could not compare.

    Raises:
        ValueError: fewer than 2 candidates, or than that many different texts.
    """
    if candidates < 2:
        raise ValueError(f"candidates: expected at least 2, got {candidates}")
    if (different := len(set(texts))) < candidates:
        raise ValueError(
            f"texts: expected at least {candidates} different ones for {candidates - 1} mismatched each, got {different}"
        )


@torch.no_grad()
def r_precision(
    image: Tensor, text: Tensor, texts: Sequence[str], *, candidates: int = 100, seed: int = 0
) -> RPrecision:
    """Rank the text that a picture was generated from among mismatched ones; the share of pictures where it is first.

        R = mean_i [cos(x_i, s_i) > cos(x_i, s_j) for every mismatched j]

    Xu et al. 2018 (AttnGAN), with the vectors of an encoder that no part of the generator was trained with. Ties, and scores
    that are NaN, count against the picture.

    Args:
        image: [N, D] vectors of generated pictures.
        text: [N, D] vectors of their texts.
        texts: the N texts themselves.
        candidates: the own text and the mismatched ones.
        seed: of the mismatched texts.

    Raises:
        ValueError: shapes that do not fit, fewer than 2 candidates, or too few different texts.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"image, text: expected two tensors [N, D], got {list(image.shape)}, {list(text.shape)}"
        )
    if len(texts) != len(image):
        raise ValueError(f"texts: expected {len(image)}, one a picture, got {len(texts)}")
    check_candidates(texts, candidates)
    others = mismatched_texts(texts, candidates - 1, seed)
    image, text = (torch.nn.functional.normalize(rows.double().cpu(), dim=-1) for rows in (image, text))
    ranks = []
    for rows in torch.arange(len(image)).split(64):
        compared = text[torch.cat([rows[:, None], others[rows]], dim=1)]  # [n, candidates, D]
        # one and the same sum for all: a matrix product may round equal vectors differently, and break a tie
        scores = (image[rows, None] * compared).sum(dim=2)
        ranks.append((~(scores[:, 1:] < scores[:, :1])).sum(dim=1))
    rank = torch.cat(ranks).double()
    return RPrecision(float((rank == 0).double().mean()), float(rank.mean()) + 1, candidates)
