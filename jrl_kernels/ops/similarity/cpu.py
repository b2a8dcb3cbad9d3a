"""The CPU backend: a BLAS fills a tile of scores, C++ loops of the extension search it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _extension, _order
from ..._checks import accumulation
from ..._cpu_tiles import BLOCK as BLOCK
from ..._extension import pointer
from .search import METRICS, Listed, Pairs, Rounding

NOTHING = torch.iinfo(torch.int64).max


def prepare(tensor: Tensor) -> Tensor:
    """Embeddings in the dtype that tiles are computed in, rows contiguous."""
    return tensor.to(accumulation(tensor.dtype)).contiguous()


def order_scores(x: Tensor, y: Tensor, out: Tensor) -> None:
    _order.scores(x, y, out)


def order_gradients(g: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
    _order.accumulate_gradients(g, x, y, dx, dy)


def fill(x: Tensor, y: Tensor, metric: str, tile: Tensor) -> None:
    if metric == "order":
        _order.scores(x, y, tile)
    else:
        torch.mm(x, y.T, out=tile)


def _launch(name: str, pairs: Pairs, *arguments: int | float) -> None:
    _extension.launch(f"{name}_{'f64' if pairs.dtype == torch.float64 else 'f32'}_cpu", *arguments)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [pointer(tensor) for tensor in tensors]


def _embeddings(pairs: Pairs, bounds: Rounding) -> list[int]:
    kind, norms = METRICS.index(pairs.metric), _addresses(bounds.x_norm, bounds.y_norm)
    return [kind, *_addresses(pairs.x, pairs.y), pairs.x.shape[1], *norms]


def _others(pairs: Pairs) -> list[int]:
    return [*_addresses(pairs.a, pairs.b), 0 if pairs.a is None else pairs.a.shape[1]]


def best(pairs: Pairs, bounds: Rounding, group: Listed) -> Tensor:
    """The best positive of each row, in float64."""
    out = torch.empty(pairs.shape[0], dtype=torch.float64)
    _launch("similarity_best", pairs, *_embeddings(pairs, bounds), len(out), *_addresses(*group, out))
    return out


def count(
    tile: Tensor, r0: int, c0: int, pairs: Pairs, bounds: Rounding, group: Listed,
    low: Tensor, high: Tensor, best: Tensor, counts: Tensor,
) -> None:  # fmt: skip
    """Adds to `counts` what a tile has that is not below the best positive."""
    sizes = pointer(tile), *tile.shape, r0, c0
    rounding = *_addresses(*bounds.vectors), bounds.relative
    state = _addresses(*group, low, high, best, counts)
    _launch("similarity_count", pairs, *sizes, *rounding, *_embeddings(pairs, bounds), *state)


class Found(NamedTuple):
    """Heaps [M, k] of what was found so far: scores to within their errors, and columns."""

    values: Tensor
    errors: Tensor
    indices: Tensor


def nothing(pairs: Pairs, k: int) -> Found:
    shape = pairs.shape[0], k
    values = torch.full(shape, -torch.inf, dtype=pairs.dtype)
    return Found(values, torch.zeros_like(values), torch.full(shape, NOTHING))


def select(
    tile: Tensor, r0: int, c0: int, pairs: Pairs, bounds: Rounding, exclude: tuple[Tensor, Tensor] | None, found: Found
) -> None:  # fmt: skip
    """Offers a tile's entries to the heaps."""
    sizes = pointer(tile), *tile.shape, r0, c0
    rounding = *_addresses(*bounds.vectors), bounds.relative
    ids = _addresses(*(exclude or (None, None)))
    state = found.values.shape[1], *_addresses(*found)
    _launch(
        "similarity_select",
        pairs,
        *sizes,
        *rounding,
        *_embeddings(pairs, bounds),
        *_others(pairs),
        *ids,
        *state,
    )


def finish(pairs: Pairs, bounds: Rounding, found: Found) -> tuple[Tensor, Tensor]:
    """Exact scores and columns in descending order; -inf and -1 where nothing was found."""
    state = *found.values.shape, *_addresses(*found)
    _launch("similarity_sort", pairs, *_embeddings(pairs, bounds), *_others(pairs), *state)
    return found.values, found.indices
