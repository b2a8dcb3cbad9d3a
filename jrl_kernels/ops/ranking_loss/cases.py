"""Inputs, shapes and costs of the ranking loss: the only source of them for tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shape(NamedTuple):
    rows: int  # M
    columns: int  # N
    width: int  # D
    negatives: int = 0  # Q


SHAPES = {
    "one": Shape(1, 1, 8),
    "tiny": Shape(6, 6, 5),
    "ragged": Shape(37, 53, 19, 11),
    "wide": Shape(21, 9, 130, 5),
    "tall": Shape(130, 67, 16),
}
"""Small shapes for tests; none but "tiny" is a multiple of anything."""

BENCHMARK_SHAPES = {
    "cpu": [Shape(128, 128, 1024), Shape(4096, 4096, 512)],
    "cuda": [
        Shape(128, 128, 1024),
        Shape(4096, 4096, 1024),
        Shape(256, 256, 1024, 65536),
        Shape(65536, 65536, 768),
    ],
}
"""SCAN's batch, VSE at a large batch, MCT's queue, and the batch of the contrastive losses."""


def make_inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    metric: str = "cosine",
    exclude: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ranking_loss`: rows near their positives, so that some candidates violate the margin and some do not.

    For "order" the vectors are absolute values of unit ones, as order embeddings are; for "dot" their norms vary.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns, width, queue = shape

    def vectors(count: int, near: Tensor | None = None) -> Tensor:
        drawn = torch.randn(count, width, generator=generator, dtype=torch.float64)
        if near is not None:
            shared = min(count, near.shape[0])
            drawn[:shared] += 0.4 * near[:shared]
        drawn = F.normalize(drawn, dim=1)
        if metric == "order":
            return drawn.abs()
        return drawn * (0.5 + torch.rand(count, 1, generator=generator, dtype=torch.float64))

    def ids(count: int) -> Tensor:
        return torch.randint(max(2, min(rows, columns) // 2), (count,), generator=generator).to(device)

    x = vectors(rows)
    y = vectors(columns, near=x * width**0.5)
    arguments: dict[str, Any] = {
        "x": x.to(device=device, dtype=dtype).requires_grad_(),
        "y": y.to(device=device, dtype=dtype).requires_grad_(),
        "metric": metric,
    }
    if queue:
        arguments["negatives"] = vectors(queue).to(device=device, dtype=dtype)
    if exclude:
        arguments["exclude"] = (ids(rows), ids(columns)) + ((ids(queue),) if queue else ())
    return arguments


def flops(shape: Shape, backward: bool) -> int:
    """Multiply-adds counted twice: one product forward; one recomputed and two more (one for a queue) for the gradients."""
    pairs, queued = shape.rows * shape.columns, shape.rows * shape.negatives
    return 2 * shape.width * (4 * pairs + 3 * queued if backward else pairs + queued)


def bytes_moved(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """The least traffic: inputs read once forward; read again and gradients written once backward."""
    embeddings = (shape.rows + shape.columns) * shape.width * dtype.itemsize
    queue = shape.negatives * shape.width * dtype.itemsize
    return embeddings * (3 if backward else 1) + queue * (2 if backward else 1)
