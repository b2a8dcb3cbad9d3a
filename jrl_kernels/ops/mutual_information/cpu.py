"""The CPU backend: C++ loops of the extension reduce a tile of scores, or turn it into its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._cpu_tiles import BLOCK, Tiles
from ..._cpu_tiles import prepare as prepare
from ..._extension import pointer
from ..._sweep import GradientTile, Source
from .sweep import Images, Upstream


class _LogSum:
    """Streaming log-sum-exp of one side."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.max = torch.full((length,), -torch.inf, dtype=dtype)
        self.sum = torch.zeros(length, dtype=dtype)

    def finish(self) -> Tensor:
        return torch.where(self.max == -torch.inf, 0.0, self.max) + self.sum.log()


def _pointers(side: _LogSum | None, offset: int) -> tuple[int, int]:
    return (0, 0) if side is None else (pointer(side.max, offset), pointer(side.sum, offset))


def log_sum_exp(
    source: Source, images: Images, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Log-sum-exp over each row's and each column's entries of other images; -inf where there is none."""
    tiles = Tiles(source)
    x = _LogSum(source.shape[0], source.dtype) if rows else None
    y = _LogSum(source.shape[1], source.dtype) if columns else None
    for r0, c0, tile in tiles:
        tiles.launch("mutual_information_mask", tile, pointer(images.x, r0), pointer(images.y, c0))
        tiles.launch("info_nce_statistics", tile, *_pointers(x, r0), *_pointers(y, c0))
    return None if x is None else x.finish(), None if y is None else y.finish()


def softplus_sums(source: Source, images: Images) -> Tensor:
    """Sum of softplus(u) over each row's entries of other images."""
    tiles = Tiles(source)
    sums = torch.zeros(source.shape[0], dtype=source.dtype)
    for r0, c0, tile in tiles:
        ids = pointer(images.x, r0), pointer(images.y, c0)
        tiles.launch("mutual_information_softplus", tile, *ids, pointer(sums, r0))
    return sums


def gradient(source: Source, images: Images, upstream: Upstream) -> tuple[GradientTile, tuple[int, int]]:
    """d bound / du, tile by tile."""
    tiles = Tiles(source)
    slopes = torch.stack([upstream.own, upstream.off])
    kind = ("nce", "jsd", "dv").index(upstream.bound)

    def tile_gradient(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        tile = tiles.logits(r0, r1, c0, c1)
        ids = pointer(images.x, r0), pointer(images.y, c0)
        x = pointer(upstream.log_sum_x, r0), pointer(upstream.weight_x, r0)
        y = pointer(upstream.log_sum_y, c0), pointer(upstream.weight_y, c0)
        tiles.launch("mutual_information_gradient", tile, *ids, *x, *y, pointer(slopes), kind)
        return tile

    return tile_gradient, BLOCK
