"""Inputs, shapes and costs of late interaction: the only source of them for tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shape(NamedTuple):
    images: int  # B
    captions: int  # C
    regions: int  # R
    words: int  # T
    width: int  # D


SHAPES = {
    "one": Shape(1, 1, 1, 1, 8),
    "tiny": Shape(3, 4, 5, 6, 4),
    "ragged": Shape(5, 7, 37, 19, 21),
    "wide": Shape(2, 3, 9, 11, 130),
    "long": Shape(2, 3, 150, 139, 16),
}
"""Small shapes for tests."""

BENCHMARK_SHAPES = {
    "cpu": [Shape(64, 64, 64, 32, 128)],
    "cuda": [Shape(1024, 1024, 128, 128, 128), Shape(1024, 1024, 300, 32, 128)],
}


def make_inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mask: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `max_sim`: unit vectors; gradients required.

    With `mask` some items in the middle do not count either, and where there are several, the last image and the last caption
    have none that do.
    """
    generator = torch.Generator().manual_seed(seed)
    images, captions, regions, words, width = shape

    def unit(*size: int) -> Tensor:
        vectors = torch.randn(*size, width, generator=generator, dtype=torch.float64)
        return F.normalize(vectors, dim=-1).to(device=device, dtype=dtype).requires_grad_()

    def valid(groups: int, length: int) -> Tensor:
        kept = torch.rand(groups, length, generator=generator) < 0.7
        if groups > 1:
            kept[-1] = False
        return kept.to(device)

    arguments: dict[str, Any] = {"regions": unit(images, regions), "words": unit(captions, words)}
    if mask:
        arguments |= {"region_mask": valid(images, regions), "word_mask": valid(captions, words)}
    return arguments


def pack(arguments: dict[str, Any], lengths_dtype: torch.dtype = torch.int32) -> dict[str, Any]:
    """Arguments of `max_sim_varlen` with the items of `max_sim`'s that count."""
    packed: dict[str, Any] = {}
    for name in ("regions", "words"):
        rows, mask = arguments[name], arguments.get(f"{name[:-1]}_mask")
        if mask is None:
            mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        packed[name] = rows.detach()[mask].requires_grad_()
        packed[f"cu_seqlens_{name}"] = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(lengths_dtype)
    return packed


def flops(shape: Shape, backward: bool) -> int:
    """Multiply-adds counted twice: the similarities forward; one item a maximum for either gradient backward."""
    forward = 2 * shape.images * shape.captions * shape.regions * shape.words * shape.width
    return forward + (forward // max(1, shape.regions) * 2 if backward else 0)


def bytes_moved(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """The least traffic: inputs read and choices of two bytes written once; all read and gradients written backward."""
    rows = shape.images * shape.regions + shape.captions * shape.words
    choices = 2 * shape.images * shape.captions * shape.words
    inputs = rows * shape.width * dtype.itemsize
    return inputs * (3 if backward else 1) + choices * (2 if backward else 1)
