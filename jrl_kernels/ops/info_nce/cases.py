"""Inputs, shapes and costs of the contrastive losses: the only source of them for tests and benchmarks."""

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
    "cpu": [Shape(2048, 2048, 512), Shape(8192, 8192, 512)],
    "cuda": [
        Shape(8192, 8192, 512),
        Shape(32768, 32768, 768),
        Shape(65536, 65536, 768),
        Shape(65536, 65536, 1024),
    ],
}

POSITIVES = ("diagonal", "index", "ids", "sparse")


def make_inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    positives: str = "diagonal",
    negatives: int = 0,
    exclude: bool = False,
    weights: bool = False,
    scale: float = 10.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `info_nce`: unit rows, `scale` a 0-d tensor, positives of the kind named; gradients required.

    With "ids" and "sparse" some rows have several positives and some none; with `exclude` some excluded pairs are positives.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns, width = shape

    def unit(count: int) -> Tensor:
        vectors = F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)
        return vectors.to(device=device, dtype=dtype)

    def ids(count: int, kinds: int) -> Tensor:
        return torch.randint(kinds, (count,), generator=generator).to(device)

    arguments: dict[str, Any] = {
        "x": unit(rows).requires_grad_(),
        "y": unit(columns).requires_grad_(),
        "scale": torch.tensor(
            scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device
        ),
    }
    arguments["scale"].requires_grad_()
    kinds = max(2, min(rows, columns) // 2)
    if positives == "index":
        arguments["positives"] = ids(rows, columns)
    elif positives == "ids":
        arguments["positives"] = (ids(rows, kinds), ids(columns, kinds))
    elif positives == "sparse":
        dense = torch.rand(rows, columns, generator=generator) < 2 / columns
        arguments["positives"] = dense.to_sparse_csr().to(device)
    if negatives:
        arguments["negatives"] = unit(negatives)
    if exclude:
        arguments["exclude"] = (ids(rows, kinds), ids(columns, kinds))
        if negatives:
            arguments["exclude"] += (ids(negatives, kinds),)
    if weights:
        arguments["weights"] = tuple(
            torch.rand(count, generator=generator, dtype=torch.float64).to(
                device, torch.float32 if dtype != torch.float64 else dtype
            )
            for count in (rows, columns)
        )
    return arguments


def flops(shape: Shape, backward: bool) -> int:
    """Multiply-adds counted twice: one product forward; one recomputed and two more for the gradients backward."""
    return 2 * shape.rows * shape.columns * shape.width * (4 if backward else 1)


def bytes_moved(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """The least traffic: inputs read once forward; read again and gradients written once backward."""
    embeddings = (shape.rows + shape.columns) * shape.width * dtype.itemsize
    return embeddings * (3 if backward else 1)
