"""The CPU backend: a BLAS fills a tile of logits, C++ loops of the extension reduce it or turn it into its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import _extension
from ..._checks import accumulation
from .positives import Positives
from .sweep import Axis, GradientTile, Options, Source, Statistics, Upstream

BLOCK = (1024, 1024)


def prepare(tensor: Tensor) -> Tensor:
    """Matrix operands in the dtype that the tiles are computed in, rows contiguous."""
    return tensor.to(accumulation(tensor.dtype)).contiguous()


def _pointer(tensor: Tensor | None, offset: int = 0) -> int:
    return 0 if tensor is None else tensor.data_ptr() + offset * tensor.element_size()


class _Tiles:
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

    def mask(self, tile: Tensor, r0: int, c0: int, options: Options) -> None:
        if options.exclude_x is not None:
            x_ids, y_ids = options.positives.x_ids, options.positives.y_ids
            exclude = _pointer(options.exclude_x, r0), _pointer(options.exclude_y, c0)
            self.launch("info_nce_mask", tile, *exclude, _pointer(x_ids, r0), _pointer(y_ids, c0))

    def exchange(
        self, how: str, tile: Tensor, r0: int, c0: int, positives: Positives, values: Tensor | None
    ) -> None:
        """`how` "gather" reads the listed pairs of this tile into `values`, "scatter" writes them."""
        if values is not None and positives.rows is not None:
            pairs = _pointer(positives.rows), _pointer(positives.columns), positives.rows.numel()
            self.launch(f"info_nce_{how}", tile, r0, c0, *pairs, values.data_ptr())


class _Running:
    """Streaming sums of one side."""

    def __init__(self, length: int, source: Source, options: Options) -> None:
        def full(value: float) -> Tensor:
            return torch.full((length,), value, dtype=source.dtype)

        self.max, self.sum = full(-torch.inf), full(0.0)
        self.weighted = full(0.0) if options.details else None
        self.candidates = full(0.0) if options.details else None
        self.argmax = torch.full((length,), -1) if options.details else None
        by_id = options.positives.x_ids is not None
        self.positive_max = full(-torch.inf) if by_id else None
        self.positive_sum = full(0.0) if by_id else None
        self.log_of_sum = options.multi_positive == "sum"

    def pointers(self, offset: int) -> tuple[int, ...]:
        sums: tuple[Tensor | None, ...] = (self.max, self.sum)
        if self.argmax is not None:
            sums = (*sums, self.weighted, self.argmax, self.candidates)
        return tuple(_pointer(t, offset) for t in sums)

    def finish(self) -> Axis:
        total = torch.where(self.max == -torch.inf, 0.0, self.max) + self.sum.log()
        positive = self.positive_sum
        if positive is not None and self.log_of_sum:
            assert self.positive_max is not None
            positive = torch.where(self.positive_max == -torch.inf, 0.0, self.positive_max) + positive.log()
        if self.weighted is None:
            return Axis(total, positive)
        expectation = torch.where(self.sum == 0, 0.0, self.weighted / self.sum)
        return Axis(total, positive, self.max, self.argmax, expectation, self.candidates)


def _positive_pointers(side: _Running | None, offset: int) -> tuple[int, int]:
    if side is None:
        return 0, 0
    return _pointer(side.positive_max, offset), _pointer(side.positive_sum, offset)


def statistics(source: Source, options: Options) -> Statistics:
    """One sweep over the logits: log-sum-exp (and details) of rows and columns, logits of the listed positives."""
    tiles = _Tiles(source)
    positives = options.positives
    pair_logits = None if positives.rows is None else torch.empty(positives.rows.numel(), dtype=source.dtype)
    rows = _Running(source.shape[0], source, options) if options.rows else None
    columns = _Running(source.shape[1], source, options) if options.columns else None
    absent = (0,) * (5 if options.details else 2)
    for r0, c0, tile in tiles:
        tiles.exchange("gather", tile, r0, c0, positives, pair_logits)
        tiles.mask(tile, r0, c0, options)
        if positives.x_ids is not None:
            ids = _pointer(positives.x_ids, r0), _pointer(positives.y_ids, c0)
            sums = (*_positive_pointers(rows, r0), *_positive_pointers(columns, c0))
            tiles.launch("info_nce_positives", tile, *ids, *sums, int(options.multi_positive == "sum"))
        row_sums = absent if rows is None else rows.pointers(r0)
        column_sums = absent if columns is None else columns.pointers(c0)
        if options.details:
            tiles.launch("info_nce_details", tile, r0, c0, *row_sums, *column_sums)
        else:
            tiles.launch("info_nce_statistics", tile, *row_sums, *column_sums)
    return Statistics(
        None if rows is None else rows.finish(), None if columns is None else columns.finish(), pair_logits
    )


def softmax_gradient(
    source: Source, options: Options, upstream: Upstream
) -> tuple[GradientTile, tuple[int, int]]:
    """dL/ds of a softmax loss, tile by tile."""
    tiles = _Tiles(source)
    positives = options.positives

    def tile_gradient(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        tile = tiles.logits(r0, r1, c0, c1)
        tiles.mask(tile, r0, c0, options)
        x = upstream.grad_x, upstream.log_sum_exp_x, upstream.positive_x
        y = upstream.grad_y, upstream.log_sum_exp_y, upstream.positive_y
        sides = [_pointer(t, r0) for t in x] + [_pointer(t, c0) for t in y]
        ids = _pointer(positives.x_ids, r0), _pointer(positives.y_ids, c0)
        tiles.launch("info_nce_gradient", tile, *sides, *ids, int(options.multi_positive == "sum"))
        tiles.exchange("scatter", tile, r0, c0, positives, upstream.pair_gradient)
        return tile

    return tile_gradient, BLOCK


def sigmoid_sums(source: Source, positives: Positives) -> tuple[Tensor, Tensor | None]:
    """Row sums of softplus(s), less s where ids are equal; and the logits of the listed positives."""
    tiles = _Tiles(source)
    sums = torch.zeros(source.shape[0], dtype=source.dtype)
    pair_logits = None if positives.rows is None else torch.empty(positives.rows.numel(), dtype=source.dtype)
    for r0, c0, tile in tiles:
        tiles.exchange("gather", tile, r0, c0, positives, pair_logits)
        ids = _pointer(positives.x_ids, r0), _pointer(positives.y_ids, c0)
        tiles.launch("sigmoid_contrastive_sums", tile, *ids, _pointer(sums, r0))
    return sums, pair_logits


def sigmoid_gradient(
    source: Source, positives: Positives, upstream: Tensor, pair_logits: Tensor | None
) -> tuple[GradientTile, tuple[int, int]]:
    """dL/ds of the sigmoid loss, tile by tile: upstream_i (sigmoid(s_ij) - 1 for a positive)."""
    tiles = _Tiles(source)
    pair_gradient = None
    if pair_logits is not None and positives.rows is not None:
        pair_gradient = -upstream[positives.rows] * torch.sigmoid(-pair_logits)

    def tile_gradient(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        tile = tiles.logits(r0, r1, c0, c1)
        ids = _pointer(positives.x_ids, r0), _pointer(positives.y_ids, c0)
        tiles.launch("sigmoid_contrastive_gradient", tile, _pointer(upstream, r0), *ids)
        tiles.exchange("scatter", tile, r0, c0, positives, pair_gradient)
        return tile

    return tile_gradient, BLOCK
