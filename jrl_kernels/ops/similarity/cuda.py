"""The CUDA backend: cuBLAS fills a tile of scores, CUDA C++ kernels of the extension search it."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _extension
from ..._extension import pointer
from . import gpu
from .gpu import BLOCK as BLOCK
from .gpu import nothing as nothing
from .gpu import prepare as prepare
from .search import METRICS, Listed, Pairs, Rounding

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In the order of the launchers' numbers."""
THREADS = 256


def fill(x: Tensor, y: Tensor, metric: str, tile: Tensor) -> None:
    if metric == "order":
        operands = TYPES.index(x.dtype), pointer(x), pointer(y), *tile.shape, x.shape[1], pointer(tile)
        _extension.launch_cuda("similarity_order_cuda", x.device, *operands)
    else:
        gpu.product(x, y, tile)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [pointer(tensor) for tensor in tensors]


def _embeddings(pairs: Pairs, bounds: Rounding) -> list[int]:
    kind, norms = (
        (METRICS.index(pairs.metric), TYPES.index(pairs.x.dtype)),
        _addresses(bounds.x_norm, bounds.y_norm),
    )
    return [*kind, *_addresses(pairs.x, pairs.y), pairs.x.shape[1], *norms]


def best(pairs: Pairs, bounds: Rounding, group: Listed) -> Tensor:
    """The best positive of each row, in float64."""
    out = torch.empty(pairs.shape[0], dtype=torch.float64, device=pairs.x.device)
    if len(out):
        operands = *_embeddings(pairs, bounds), len(out), *_addresses(*group, out)
        _extension.launch_cuda("similarity_best_cuda", out.device, *operands)
    return out


def count(
    tile: Tensor, r0: int, c0: int, pairs: Pairs, bounds: Rounding, group: Listed,
    low: Tensor, high: Tensor, best: Tensor, counts: Tensor,
) -> None:  # fmt: skip
    """Adds to `counts` what a tile has that is not below the best positive."""
    rounding = *_addresses(*bounds.vectors), bounds.relative
    state = _addresses(*group, low, high, best, counts)
    operands = pointer(tile), *tile.shape, r0, c0, *rounding, *_embeddings(pairs, bounds), *state
    _extension.launch_cuda("similarity_count_cuda", tile.device, *operands)


def capacity(k: int) -> int:
    """How many keys a block sorts: a power of two with room for what two strides of its threads may find."""
    least = max(2 * k, k + 2 * THREADS)
    return 1 << (least - 1).bit_length()


def select(
    tile: Tensor, r0: int, c0: int, pairs: Pairs, bounds: Rounding, exclude: tuple[Tensor, Tensor] | None, keys: Tensor
) -> None:  # fmt: skip
    """Merges a tile's entries into the keys."""
    rounding = *_addresses(*bounds.vectors), bounds.relative
    other = *_addresses(pairs.a, pairs.b), 0 if pairs.a is None else pairs.a.shape[1]
    ids = _addresses(*(exclude or (None, None)))
    k = keys.shape[1]
    operands = *_embeddings(pairs, bounds), *other, *ids, k, capacity(k), pointer(keys)
    _extension.launch_cuda(
        "similarity_select_cuda", tile.device, pointer(tile), *tile.shape, r0, c0, *rounding, *operands
    )


def finish(pairs: Pairs, bounds: Rounding, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Exact scores and columns in descending order."""
    return gpu.decode(keys)
