"""Batches of pictures and captions, from memory or from files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jrl.data.images import Augment, ImageError, ImageTransform, load_image
from jrl.data.sample import Sample, SkipReport
from jrl.training.augment import augment_batch
from jrl.training.captions import Captions
from jrl.training.loader import Batch


class MemorySource:
    """Pictures decoded once into one uint8 tensor; a batch is an index, an augmentation and a subtraction.

    Args:
        pixels: [N, 3, S, S] uint8.
        captions: of the N samples.
        mean, std: of the normalisation, on the scale 0 to 1.
        augment: random changes; None for none.
        train: one random caption of each sample, or all of them with `caption_image`.
    """

    def __init__(
        self,
        pixels: Tensor,
        captions: Captions,
        mean: Tensor,
        std: Tensor,
        augment: Augment | None,
        *,
        train: bool,
    ) -> None:
        self.pixels, self.captions, self.augment, self.train = pixels, captions, augment, train
        self.mean, self.std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Tensor, seed: int) -> Batch:
        """The batch of these samples; `seed` draws captions and augmentation."""
        generator = torch.Generator().manual_seed(seed)
        texts = self.captions.one_each(indices, seed) if self.train else self.captions.all_of(indices)
        pixels = self.pixels[indices].float().div_(255)
        if self.augment is not None:
            pixels = augment_batch(pixels, self.augment, generator)
        return {"pixel_values": (pixels - self.mean) / self.std, **texts}


class FileSource:
    """Pictures opened when their batch is due; one that cannot be read is counted, named and left out.

    Args:
        samples: the samples.
        captions: of the samples.
        transform: picture to tensor; its augmentation is used when there is one.
        train: one random caption of each sample, or all of them with `caption_image`.
    """

    def __init__(
        self, samples: Sequence[Sample], captions: Captions, transform: ImageTransform, *, train: bool
    ) -> None:
        self.samples, self.captions, self.transform, self.train = samples, captions, transform, train

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Tensor, seed: int) -> Batch:
        """The batch of these samples; `skipped` lists (reason, message) of the pictures left out.

        Raises:
            ValueError: none of the pictures can be read.
        """
        tensors: list[Tensor] = []
        kept: list[int] = []
        skipped: list[tuple[str, str]] = []
        for position, index in enumerate(indices.tolist()):
            generator = np.random.default_rng((seed, position))
            try:
                image = load_image(self.samples[index].image, name=self.samples[index].key)
                tensors.append(self.transform(image, generator))
                kept.append(position)
            except ImageError as error:
                skipped.append((error.reason, str(error)))
        if not tensors:
            raise ValueError(
                f"no picture of a batch of {len(indices)} can be read; the first: {skipped[0][1]}"
            )
        chosen = indices[kept]
        texts = self.captions.one_each(chosen, seed) if self.train else self.captions.all_of(chosen)
        return {"pixel_values": torch.stack(tensors), **texts, "skipped": skipped}


def decode_all(samples: Sequence[Sample], size: int, skips: SkipReport) -> tuple[Tensor, list[Sample]]:
    """All pictures as uint8 [N, 3, size, size]; those that cannot be read are counted in `skips`.

    Args:
        samples: the samples.
        size: side of the centre square they are resized to.
        skips: the account of what was left out.

    Returns:
        The pixels, and the samples that they belong to.

    Raises:
        ValueError: no picture could be read.
    """
    transform = ImageTransform(size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    kept: list[Sample] = []
    for sample in samples:
        try:
            image = load_image(sample.image, name=sample.key)
        except ImageError as error:
            skips.add(error.reason, str(error))
            continue
        pixels[len(kept)] = _to_uint8(image, transform)
        kept.append(sample)
    skips.raise_if_empty(len(kept), "pictures")
    return pixels[: len(kept)], kept


def _to_uint8(image: Image.Image, transform: ImageTransform) -> Tensor:
    if image.size == (transform.size, transform.size):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return transform(image).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
