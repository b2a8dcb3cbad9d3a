"""Inputs, shapes and costs of word_context: the only source of them for tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    images: int  # B
    regions: int  # R
    words: int  # T
    width: int  # D


SHAPES = {
    "one": Shape(1, 1, 1, 4),
    "tiny": Shape(3, 4, 6, 5),
    "ragged": Shape(5, 37, 19, 33),
    "wide": Shape(2, 9, 70, 130),
}
"""Small shapes for tests."""

BENCHMARK_SHAPES = {
    "cpu": [Shape(8, 256, 17, 768), Shape(64, 64, 20, 256)],
    "cuda": [Shape(8, 256, 17, 768), Shape(256, 256, 32, 256)],
}


def make_inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mask: bool = True,
    scale: float = 15.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `word_context`; gradients required. With `mask` captions differ in length, and the last has no words."""
    generator = torch.Generator().manual_seed(seed)
    images, regions, words, width = shape

    def normal(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64)
        return values.to(device=device, dtype=dtype).requires_grad_()

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {
        "regions": normal(images, regions, width),
        "words": normal(images, words, width),
        "attention_scale": torch.tensor(scale, dtype=wide, device=device, requires_grad=True),
    }
    if mask:
        lengths = torch.randint(1, max(2, words + 1), (images,), generator=generator)
        if images > 1:
            lengths[-1] = 0
        arguments["word_mask"] = (torch.arange(words) < lengths[:, None]).to(device)
    return arguments


def flops(shape: Shape, backward: bool) -> int:
    """Multiply-adds counted twice: two products forward; one recomputed and four for the gradients backward."""
    return 2 * shape.images * shape.regions * shape.words * shape.width * (7 if backward else 2)


def bytes_moved(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """The least traffic: both sides read and the contexts written once; all of it and their gradients again backward."""
    regions, words = (shape.images * count * shape.width for count in (shape.regions, shape.words))
    return (2 * regions + words) * dtype.itemsize * (3 if backward else 1)
