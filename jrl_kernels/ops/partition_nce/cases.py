"""Inputs, shapes and costs of noise-contrastive estimation: the only source of them for tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shape(NamedTuple):
    queries: int  # B
    bank: int  # N
    width: int  # D
    positives: int  # K
    negatives: int  # Q


SHAPES = {
    "one": Shape(1, 1, 1, 1, 1),
    "tiny": Shape(3, 10, 4, 1, 5),
    "ragged": Shape(7, 29, 19, 3, 37),
    "wide": Shape(4, 13, 300, 2, 11),
    "tall": Shape(33, 50, 8, 5, 3),
}
"""Small shapes for tests."""

BENCHMARK_SHAPES = {
    "cpu": [Shape(256, 232_067, 128, 1, 1024), Shape(256, 232_067, 128, 32, 64)],
    "cuda": [
        Shape(256, 232_067, 128, 1, 1024),
        Shape(256, 1_784_108, 128, 1, 1024),
        Shape(256, 232_067, 128, 32, 64),
    ],
}
"""AVID's instances on Kinetics and on AudioSet, and AVID-CMA's positive sets."""


def make_inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    masked: bool = False,
    scale: float = 1 / 0.07,
    log_partition: float = 3.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `partition_nce`: unit rows, `scale` a 0-d tensor; query and scale require gradients.

    Indices repeat within a row. With `masked` some positives do not count, in the first of several rows none.
    """
    generator = torch.Generator().manual_seed(seed)

    def unit(count: int) -> Tensor:
        vectors = F.normalize(torch.randn(count, shape.width, generator=generator), dim=1)
        return vectors.to(device=device, dtype=dtype)

    def indices(columns: int) -> Tensor:
        found = torch.randint(shape.bank, (shape.queries, columns), generator=generator)
        found[:, -1] = found[:, 0]
        return found.to(device)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {
        "query": unit(shape.queries).requires_grad_(),
        "bank": unit(shape.bank),
        "positive_index": indices(shape.positives),
        "negative_index": indices(shape.negatives),
        "scale": torch.tensor(scale, dtype=wide, device=device).requires_grad_(),
        "log_partition": log_partition,
    }
    if masked:
        counts = torch.rand(shape.queries, shape.positives, generator=generator) < 0.6
        if shape.queries > 1:
            counts[0] = False
        arguments["positive_mask"] = counts.to(device)
        # What a masked index holds must not matter.
        arguments["positive_index"].masked_fill_(~arguments["positive_mask"], -1)
    return arguments


def flops(shape: Shape, backward: bool) -> int:
    """Multiply-adds counted twice: one product a gathered row forward, one more for its share of the gradient."""
    return 2 * shape.queries * (shape.positives + shape.negatives) * shape.width * (2 if backward else 1)


def bytes_moved(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """The least traffic: every gathered row and index read once; queries read, and their gradients written backward."""
    terms = shape.queries * (shape.positives + shape.negatives)
    queries = shape.queries * shape.width * dtype.itemsize * (2 if backward else 1)
    return terms * (shape.width * dtype.itemsize + 8) + queries
