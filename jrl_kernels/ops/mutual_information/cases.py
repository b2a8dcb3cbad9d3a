"""Inputs, shapes and costs of the bounds of the mutual information: the only source of them for tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shape(NamedTuple):
    images: int  # N
    x_locations: int  # L
    y_locations: int  # M
    width: int  # D


SHAPES = {
    "one": Shape(1, 1, 1, 8),
    "single image": Shape(1, 3, 2, 5),
    "global": Shape(37, 1, 1, 19),
    "local and global": Shape(5, 9, 1, 6),
    "local": Shape(4, 7, 11, 13),
    "wide": Shape(3, 5, 4, 130),
}
"""Small shapes for tests, none a multiple of any tile; jsd and dv need two images."""

BENCHMARK_SHAPES = {
    "cpu": [Shape(512, 1, 1, 768), Shape(64, 64, 1, 64), Shape(64, 64, 64, 64)],
    "cuda": [
        Shape(512, 1, 1, 768),
        Shape(65536, 1, 1, 768),
        Shape(64, 64, 1, 512),
        Shape(64, 64, 64, 64),
        Shape(64, 64, 64, 512),
    ],
}
"""A critic's pairs of vectors, and Deep InfoMax: 8 x 8 locations against a global vector or against 8 x 8 others."""


def make_inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    masks: bool = False,
    scale: float = 4.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `mutual_information`: unit features, `scale` a 0-d tensor; gradients required.

    A side with one location an image is [N, D]. With `masks` the sides are local, and the first image of several has no location
    of x that counts.
    """
    generator = torch.Generator().manual_seed(seed)
    images, width = shape.images, shape.width

    def features(locations: int) -> Tensor:
        size = (images, locations, width) if locations > 1 or masks else (images, width)
        vectors = F.normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=-1)
        return vectors.to(device=device, dtype=dtype).requires_grad_()

    def mask(locations: int) -> Tensor:
        return (torch.rand(images, locations, generator=generator) < 0.7).to(device)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {
        "x": features(shape.x_locations),
        "y": features(shape.y_locations),
        "scale": torch.tensor(scale, dtype=wide, device=device).requires_grad_(),
    }
    if masks:
        arguments["x_mask"], arguments["y_mask"] = mask(shape.x_locations), mask(shape.y_locations)
        if images > 1:
            arguments["x_mask"][0] = False
    return arguments


def flops(shape: Shape, backward: bool) -> int:
    """Multiply-adds counted twice: one product forward; one recomputed and two more for the gradients backward."""
    images, x_locations, y_locations, width = shape
    return 2 * images * x_locations * images * y_locations * width * (4 if backward else 1)


def bytes_moved(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """The least traffic: features read once forward; read again and gradients written once backward."""
    features = shape.images * (shape.x_locations + shape.y_locations) * shape.width * dtype.itemsize
    return features * (3 if backward else 1)
