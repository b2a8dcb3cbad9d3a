"""The CPU backend: C++ loops of the extension visit a tile of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _order
from ..._cpu_tiles import BLOCK, Tiles
from ..._cpu_tiles import prepare as prepare
from ..._extension import pointer
from ..._order import accumulate_gradients as accumulate_order  # noqa: F401  (part of a backend's contract)
from ..._sweep import GradientTile, Source
from .sweep import Options, Side, pair_scores


class _OrderTiles(Tiles):
    """Tiles of order scores instead of dot products."""

    def logits(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        assert self.source.x is not None and self.source.y is not None
        tile = self.buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
        _order.scores(self.source.x[r0:r1], self.source.y[c0:c1], tile)
        return tile


def _tiles(source: Source, options: Options) -> Tiles:
    return _OrderTiles(source) if options.metric == "order" else Tiles(source)


def _place(options: Options, r0: int, c0: int) -> tuple[int, ...]:
    ids = pointer(options.exclude_x, r0), pointer(options.exclude_y, c0)
    return r0, c0 + options.shift, options.pairs, *ids


def positive_scores(source: Source, options: Options) -> Tensor:
    """s_ii of the rows that have a positive."""
    if source.scores is not None:
        return source.scores.diagonal()[: options.pairs].contiguous()
    assert source.x is not None and source.y is not None
    return pair_scores(options.metric, source.x[: options.pairs], source.y[: options.pairs])


def statistics(source: Source, options: Options, base: Tensor) -> tuple[Side | None, Side | None]:
    """One sweep over the scores: sums and numbers of violations, or the hardest candidates."""

    def empty() -> Side:
        value, number = (-torch.inf, -1) if options.hardest else (0.0, 0)
        return Side(
            torch.full((options.pairs,), value, dtype=source.dtype), torch.full((options.pairs,), number)
        )

    tiles = _tiles(source, options)
    rows = empty() if options.rows else None
    columns = empty() if options.columns else None
    for r0, c0, tile in tiles:
        found = [pointer(t, r0) for t in rows or (None, None)] + [
            pointer(t, c0) for t in columns or (None, None)
        ]
        if options.hardest:
            tiles.launch("ranking_loss_hardest", tile, *_place(options, r0, c0), *found)
        else:
            bases = pointer(base, r0), pointer(base, c0)
            tiles.launch("ranking_loss_sums", tile, *_place(options, r0, c0), *bases, *found)
    return rows, columns


def gradient(
    source: Source, options: Options, base: Tensor, grad_x: Tensor | None, grad_y: Tensor | None
) -> tuple[GradientTile, tuple[int, int]]:
    """dL/ds of the sum of violations, tile by tile; zero on the diagonal."""
    tiles = _tiles(source, options)

    def tile_gradient(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        tile = tiles.logits(r0, r1, c0, c1)
        bases = pointer(base, r0), pointer(base, c0)
        sides = pointer(grad_x, r0), pointer(grad_y, c0)
        tiles.launch("ranking_loss_gradient", tile, *_place(options, r0, c0), *bases, *sides)
        return tile

    return tile_gradient, BLOCK
