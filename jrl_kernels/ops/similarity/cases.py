"""Inputs, shapes and costs of the similarity ops: the only source of them for tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shape(NamedTuple):
    rows: int  # M
    columns: int  # N
    width: int  # D


SHAPES = {
    "one": Shape(1, 1, 8),
    "tiny": Shape(6, 6, 5),
    "ragged": Shape(37, 53, 19),
    "wide": Shape(9, 21, 130),
    "tall": Shape(130, 67, 16),
}
"""Small shapes for tests; none but "tiny" is a multiple of anything."""

BENCHMARK_SHAPES = {
    "cpu": [Shape(25000, 5000, 512)],
    "cuda": [Shape(25000, 5000, 512), Shape(100000, 100000, 512)],
}

POSITIVES = ("diagonal", "index", "ids", "sparse")


def make_inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    metric: str = "cosine",
    positives: str | None = None,
    exclude: bool = False,
    duplicates: bool = False,
    requires_grad: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments that the ops over x and y share; for "order" absolute values of unit vectors, as its source has them.

    With `positives` those of `retrieval_ranks`: with "ids" and "sparse" some rows have several and some none. With `exclude` the
    ids of `similarity_topk`. With `duplicates` the later half of y repeats its first half.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns, width = shape

    def vectors(count: int) -> Tensor:
        found = F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)
        if metric == "dot":
            found = found * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        return found.abs() if metric == "order" else found

    def ids(count: int, kinds: int) -> Tensor:
        return torch.randint(kinds, (count,), generator=generator).to(device)

    x, y = vectors(rows), vectors(columns)
    if duplicates:
        y[columns - columns // 2 :] = y[: columns // 2].clone()
    arguments: dict[str, Any] = {
        "x": x.to(device, dtype).requires_grad_(requires_grad),
        "y": y.to(device, dtype).requires_grad_(requires_grad),
        "metric": metric,
    }
    kinds = max(2, min(rows, columns) // 2)
    if positives == "index":
        arguments["positives"] = ids(rows, columns)
    elif positives == "ids":
        arguments["positives"] = (ids(rows, kinds), ids(columns, kinds))
    elif positives == "sparse":
        dense = torch.rand(rows, columns, generator=generator) < 2 / columns
        arguments["positives"] = dense.to_sparse_csr().to(device)
    if exclude:
        arguments["exclude"] = (ids(rows, kinds), ids(columns, kinds))
    return arguments


def flops(shape: Shape, backward: bool) -> int:
    """Multiply-adds counted twice: one product forward, one for each gradient of the matrix backward."""
    return 2 * shape.rows * shape.columns * shape.width * (3 if backward else 1)


def bytes_moved(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """The least traffic: inputs read once forward; read again and gradients written once backward."""
    embeddings = (shape.rows + shape.columns) * shape.width * dtype.itemsize
    return embeddings * (3 if backward else 1)
