"""Inputs, settings, shapes and costs of word-region attention: the only source of them for tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    images: int  # B
    captions: int  # C
    words: int  # T
    regions: int  # R
    width: int  # D
    value_width: int = 0  # E; 0: no values of their own


SHAPES = {
    "one": Shape(1, 1, 1, 1, 4),
    "tiny": Shape(3, 3, 6, 4, 5),
    "ragged": Shape(5, 7, 9, 13, 19),
    "values": Shape(4, 3, 5, 6, 7, 11),
    "narrow": Shape(3, 4, 6, 37, 8),
    "narrow values": Shape(3, 2, 7, 21, 17, 4),
}
"""Small shapes for tests. In the narrow ones contexts are smaller than the R x R products of values."""

BENCHMARK_SHAPES = {
    "cpu": [Shape(64, 64, 20, 64, 256)],
    "cuda": [
        Shape(128, 128, 32, 36, 1024),
        Shape(256, 256, 32, 256, 256),
        Shape(8, 8, 17, 256, 768),  # XMC-GAN on each of its devices
        Shape(48, 48, 18, 289, 256),  # DAMSM
        Shape(128, 128, 50, 36, 1024),  # SCAN
        Shape(50, 50, 20, 30, 768, 768),  # info-ground
    ],
}

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "xmc_gan": {"preset": "xmc_gan"},
    "damsm": {"preset": "damsm"},
    "scan_t2i": {"preset": "scan_t2i"},
    "scan_i2t": {"preset": "scan_i2t"},
    "info_ground": {"preset": "info_ground"},
    "mutual_information": {"preset": "mutual_information"},
    "dvsa": {"preset": "dvsa"},
    "max_sim": {"hard": True, "match": "dot", "pool": "mean"},
    "scan_mean": {"preset": "scan_t2i", "pool": "mean"},
    "hard cosine": {"hard": True, "pool": "max", "normalize": False},
    "softmax dot": {"prenormalize": "softmax", "match": "dot", "pool": "logsumexp_undivided"},
    "l2norm": {"prenormalize": "l2norm", "pool": "max", "attention_scale": 9.0},
    "l1norm words": {"prenormalize": "l1norm", "attend": "words", "match": "dot", "pool": "none"},
    "leakyrelu": {"prenormalize": "leakyrelu", "normalize": False, "attention_scale": 1.0, "pool": "sum"},
    "leakyrelu+l1norm words": {"prenormalize": "leakyrelu+l1norm", "attend": "words", "attention_scale": 9.0},
}
"""Every row of the table of systems and others between them, as options of `word_region_scores`."""


def make_inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    masks: bool = False,
    factors: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `word_region_scores`: standard normal vectors of width 1 on average; gradients required.

    With `masks`, regions and words are missing here and there; from three images (captions) on, the second has none left. With
    `factors`, attention_scale, pool_scale and scale are 0-d tensors.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int, items: int, width: int) -> Tensor:
        values = torch.randn(count, items, width, generator=generator, dtype=torch.float64) / width**0.5
        return values.to(device=device, dtype=dtype).requires_grad_()

    def some(count: int, items: int) -> Tensor:
        mask = torch.rand(count, items, generator=generator) < 0.7
        mask[:, items // 2] = True
        if count > 2:
            mask[1] = False
        return mask.to(device)

    arguments: dict[str, Any] = {
        "regions": normal(shape.images, shape.regions, shape.width),
        "words": normal(shape.captions, shape.words, shape.width),
    }
    if shape.value_width:
        arguments["region_values"] = normal(shape.images, shape.regions, shape.value_width)
        arguments["word_values"] = normal(shape.captions, shape.words, shape.value_width)
    if masks:
        arguments["region_mask"] = some(shape.images, shape.regions)
        arguments["word_mask"] = some(shape.captions, shape.words)
    if factors:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        for name, value in (("attention_scale", 4.0), ("pool_scale", 5.0), ("scale", 2.0)):
            arguments[name] = torch.tensor(value, dtype=kind, device=device, requires_grad=True)
    return arguments


def flops(shape: Shape, backward: bool) -> int:
    """Multiply-adds counted twice, of a cosine by the smaller of R x R products and contexts.

    Forward the dots and the norms; backward both again, two products for the dots' gradients and one for the norms'. Values of
    their own add dots.
    """
    pairs = 2 * shape.images * shape.captions * shape.words * shape.regions
    dots = shape.width + shape.value_width
    norms = min(shape.regions, shape.value_width or shape.width)
    forward = pairs * (dots + norms)
    return 2 * forward + pairs * (2 * dots + norms) if backward else forward


def bytes_moved(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """The least traffic: inputs read once forward; read again and gradients written once backward."""
    items = shape.images * shape.regions + shape.captions * shape.words
    inputs = items * (shape.width + shape.value_width) * dtype.itemsize
    return inputs * (3 if backward else 1)
