"""Inputs, shapes and costs of the Gumbel ops: the only source of them for tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    images: int  # B
    groups: int  # G
    tokens: int  # S
    depth: int  # D, of queries and keys
    width: int  # E, of values


class EmbedShape(NamedTuple):
    rows: int
    codes: int  # V
    width: int  # D
    k: int


SHAPES = {
    "one": Shape(1, 1, 1, 1, 1),
    "tiny": Shape(2, 3, 5, 6, 4),
    "ragged": Shape(3, 19, 37, 11, 21),
    "quads": Shape(2, 7, 28, 8, 9),
    "many groups": Shape(2, 70, 18, 5, 3),
}
"""Small shapes for tests; only "quads" has a multiple of four tokens."""

EMBED_SHAPES = {
    "one": EmbedShape(1, 1, 1, 1),
    "tiny": EmbedShape(4, 7, 5, 3),
    "ragged": EmbedShape(23, 53, 19, 5),
    "quads": EmbedShape(9, 64, 8, 2),
    "all": EmbedShape(3, 11, 2, 11),
}

BENCHMARK_SHAPES = {
    "cpu": [Shape(32, 64, 196, 384, 384)],
    "cuda": [Shape(256, 64, 196, 384, 384), Shape(256, 8, 64, 384, 384)],
}
"""The two stages of GroupViT."""

EMBED_BENCHMARK_SHAPES = {
    "cpu": [EmbedShape(1024, 8192, 128, 1), EmbedShape(1024, 527, 768, 5)],
    "cuda": [EmbedShape(8 * 32 * 32, 8192, 128, 1), EmbedShape(4096, 527, 768, 5)],
}
"""The codes of a dVAE (32 x 32 sites an image) and Vx2Text's tokens of 527 audio classes."""


def make_inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mask: bool = False,
    scale: float | None = None,
    noise: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `gumbel_assign`: normal tensors, `scale` a 0-d tensor (default D ** -0.5), the same noise every time.

    With `mask` the first image has no token that counts. Gradients required.
    """
    generator = torch.Generator().manual_seed(seed)
    images, groups, tokens, depth, width = shape

    def normal(*sizes: int) -> Tensor:
        return _leaf(torch.randn(sizes, generator=generator, dtype=torch.float64), dtype, device)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {
        "queries": normal(images, groups, depth),
        "keys": normal(images, tokens, depth),
        "values": normal(images, tokens, width),
        "scale": torch.tensor(
            depth**-0.5 if scale is None else scale, dtype=wide, device=device
        ).requires_grad_(),
        "noise": noise,
    }
    if noise:
        arguments["seed"] = torch.tensor(seed + (7 << 40), device=device)
    if mask:
        counts = torch.rand(images, tokens, generator=generator) < 0.7
        counts[0] = False
        arguments["key_mask"] = counts.to(device)
    return arguments


def make_embed_inputs(
    shape: EmbedShape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    hard: bool = True,
    scale: float = 1.0,
    noise: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `gumbel_embed`: normal logits times `scale`, a normal codebook. Gradients required."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    arguments: dict[str, Any] = {
        "logits": _leaf(normal(shape.rows, shape.codes) * scale, dtype, device),
        "codebook": _leaf(normal(shape.codes, shape.width), dtype, device),
        "k": shape.k if hard else 1,
        "hard": hard,
        "noise": noise,
    }
    if noise:
        arguments["seed"] = torch.tensor(seed + (7 << 40), device=device)
    return arguments


def _leaf(tensor: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    return tensor.to(device=device, dtype=dtype).requires_grad_()


def flops(shape: Shape | EmbedShape, backward: bool) -> int:
    """Multiply-adds of the products counted twice.

    gumbel_assign: the logits; backward again, with du . v, dq and dk (pooling moves each value once). gumbel_embed: none
    forward; backward the product with the codebook.
    """
    if isinstance(shape, EmbedShape):
        return 2 * shape.rows * shape.codes * shape.width if backward else 0
    product = 2 * shape.images * shape.groups * shape.tokens
    return product * (shape.depth + backward * (3 * shape.depth + shape.width))


def bytes_moved(shape: Shape | EmbedShape, dtype: torch.dtype, backward: bool) -> int:
    """The least traffic: inputs read and outputs written once forward; backward inputs again, and gradients both ways."""
    if isinstance(shape, EmbedShape):
        table = shape.codes * shape.width
        inputs, outputs = shape.rows * shape.codes + table, shape.rows * shape.k * shape.width
    else:
        inputs = shape.images * (shape.groups * shape.depth + shape.tokens * (shape.depth + shape.width))
        outputs = shape.images * shape.groups * shape.width
    return (inputs + outputs) * dtype.itemsize + backward * (2 * inputs + outputs) * dtype.itemsize
