"""Texts to generate from, with their real pictures, out of a run's own data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jrl.data.sample import Sample, SkipReport
from jrl.generation.evaluate import Pair
from jrl.training.captions import with_captions
from jrl.training.data import CaptionDataModule


def run_pairs(
    run: str | Path, samples: int, *, part: str = "test", seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """Pictures of a part of a run's data, each with one of its captions, and as many others for a reference.

    Where the part has fewer pictures than `samples`, each comes again with its next caption, and round again through its
    captions: the texts then repeat, and so do the real pictures, but not the noise. No others are left then.

    Generated scenes have no end: where the part is "test" as many are drawn as are asked for, beyond those of training and
    validation, with the same pairs of colour and shape held out.

    Args:
        run: folder with the `config.yaml` that `jrl fit` wrote.
        samples: how many.
        part: of the data.
        seed: of the choice of pictures and captions.

    Returns:
        `samples` pairs, and up to as many more of other pictures; fewer where the part does not hold them.

    Raises:
        FileNotFoundError: the run has no `config.yaml`.
        ValueError: the part holds fewer than 2 pictures, or a number is out of range.
    """
    from jrl.training.command import data_module_of

    if samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    found = _samples(data_module_of(run), 2 * samples, part)
    if len(found) < 2:
        raise ValueError(f"part: expected at least 2 pictures with captions, {part} holds {len(found)}")
    draws = np.random.default_rng((seed, 2))
    chosen = [found[place] for place in draws.permutation(len(found))[: 2 * samples]]
    first = [int(draws.integers(len(captions))) for _, captions in chosen]
    rounds = -(-samples // len(chosen)) if len(chosen) < samples else 1
    pairs = [
        Pair(sample.key, captions[(place + turn) % len(captions)], sample.image)
        for turn in range(rounds)
        for (sample, captions), place in zip(chosen, first, strict=True)
    ]
    return pairs[:samples], pairs[samples:] if rounds == 1 else []


def _samples(data: CaptionDataModule, wanted: int, part: str) -> list[tuple[Sample, list[str]]]:
    if data.dataset == "scenes" and part == "test":
        data.options |= {"test": wanted, "test_compositional": 0}
    parts = data.read_parts()
    if part not in parts:
        raise ValueError(f"part: expected one of {', '.join(parts)}, got {part!r}")
    samples, captions = with_captions(parts[part], data.eval_languages, SkipReport())
    return list(zip(samples, captions, strict=True))
