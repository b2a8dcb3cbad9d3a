"""What the CPU backends over a matrix of scores share: a BLAS fills a tile of logits, C++ loops of the extension visit it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _extension
from ._checks import accumulation
from ._extension import pointer
from ._positives import Positives
from ._sweep import Source

BLOCK = (1024, 1024)


def prepare(tensor: Tensor) -> Tensor:
    """Matrix operands in the dtype that the tiles are computed in, rows contiguous."""
    return tensor.to(accumulation(tensor.dtype)).contiguous()


class Tiles:
    """Logits of one tile at a time, in a buffer that every tile reuses, and the extension's passes over it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.suffix = "f64_cpu" if source.dtype == torch.float64 else "f32_cpu"
        rows, columns = source.shape
        self.buffer = torch.empty(min(BLOCK[0], rows) * min(BLOCK[1], columns), dtype=source.dtype)
        self.scale = float(source.scale)
        self.scaled_at, self.scaled = (-1, -1), self.buffer
        self.bias = 0.0 if source.bias is None else float(source.bias)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        rows, columns = self.source.shape
        for r0 in range(0, rows, BLOCK[0]):
            for c0 in range(0, columns, BLOCK[1]):
                yield r0, c0, self.logits(r0, min(r0 + BLOCK[0], rows), c0, min(c0 + BLOCK[1], columns))

    def logits(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        tile = self.buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
        if self.source.scores is not None:
            torch.mul(self.source.scores[r0:r1, c0:c1], self.scale, out=tile)
        else:
            assert self.source.x is not None and self.source.y is not None
            if self.scaled_at != (r0, r1):
                # Once for a row of tiles; and not as addmm's alpha, since a BLAS may ignore one that is NaN.
                self.scaled_at, self.scaled = (r0, r1), self.source.x[r0:r1] * self.scale
            torch.mm(self.scaled, self.source.y[c0:c1].T, out=tile)
        if self.source.bias is not None:
            tile += self.bias
        return tile

    def launch(self, name: str, tile: Tensor, *arguments: int) -> None:
        _extension.launch(f"{name}_{self.suffix}", tile.data_ptr(), *tile.shape, *arguments)

    def exchange(
        self, how: str, tile: Tensor, r0: int, c0: int, positives: Positives, values: Tensor | None
    ) -> None:
        """`how` "gather" reads the listed pairs of this tile into `values`, "scatter" writes them."""
        if values is not None and positives.rows is not None:
            pairs = pointer(positives.rows), pointer(positives.columns), positives.rows.numel()
            self.launch(f"tile_{how}", tile, r0, c0, *pairs, values.data_ptr())
