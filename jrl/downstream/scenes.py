"""Generated scenes as pictures in memory, apart from those that systems are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jrl.data.images import ImageTransform, load_image
from jrl.data.sample import Sample
from jrl.data.scenes import MAX_OBJECTS, read_scenes

PARTS = ("train", "val", "test")
# `jrl fit` draws scenes with small seeds; a scene that trained the encoder must not come back as a test of it
_SEEDS = 10_000_000


@dataclass
class ScenePart:
    """One part of the scenes.

    Attributes:
        samples: N scenes with their objects, relations, captions and masks.
        pixels: [N, 3, H, W] float32, normalised as the encoder expects.
    """

    samples: list[Sample]
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.samples)


def scene_parts(
    transform: ImageTransform,
    *,
    train: int = 2000,
    val: int = 500,
    test: int = 500,
    max_objects: int = MAX_OBJECTS,
    seed: int = 0,
) -> dict[str, ScenePart]:
    """Scenes for training, choosing and testing heads: "train", "val" and "test".

    Args:
        transform: picture to tensor; its side is the side of the scenes.
        train, val, test: scenes of each part.
        max_objects: 1 to 4 shapes in a scene.
        seed: of the scenes; another seed, other scenes.

    Raises:
        ValueError: a part has fewer than 2 scenes, `seed` is negative, or a value is out of the range of `read_scenes`.
    """
    for name, count in (("train", train), ("val", val), ("test", test)):
        # the statistics of a batch of one picture say nothing
        if count < 2:
            raise ValueError(f"{name}: expected at least 2 scenes, got {count}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    samples = read_scenes(
        train=train,
        val=val,
        test=test,
        test_compositional=0,
        held_out=0,
        size=transform.size,
        seed=_SEEDS + seed,
        languages=["en"],
        max_objects=max_objects,
    )
    return {name: _decoded(list(samples.select(name)), transform) for name in PARTS}


def _decoded(samples: Sequence[Sample], transform: ImageTransform) -> ScenePart:
    pixels = [transform(load_image(sample.image, name=sample.key)) for sample in samples]
    return ScenePart(list(samples), torch.stack(pixels))
