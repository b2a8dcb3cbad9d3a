"""The CPU backend: C++ loops of the extension reduce a tile of logits, or turn it into its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._cpu_tiles import BLOCK, Tiles
from ..._cpu_tiles import prepare as prepare
from ..._extension import pointer
from ..._positives import Positives
from ..._sweep import GradientTile, Source
from .sweep import Axis, Options, Statistics, Upstream


def _mask(tiles: Tiles, tile: Tensor, r0: int, c0: int, options: Options) -> None:
    if options.exclude_x is not None:
        x_ids, y_ids = options.positives.x_ids, options.positives.y_ids
        exclude = pointer(options.exclude_x, r0), pointer(options.exclude_y, c0)
        tiles.launch("info_nce_mask", tile, *exclude, pointer(x_ids, r0), pointer(y_ids, c0))


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
        return tuple(pointer(t, offset) for t in sums)

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
    return pointer(side.positive_max, offset), pointer(side.positive_sum, offset)


def statistics(source: Source, options: Options) -> Statistics:
    """One sweep over the logits: log-sum-exp (and details) of rows and columns, logits of the listed positives."""
    tiles = Tiles(source)
    positives = options.positives
    pair_logits = None if positives.rows is None else torch.empty(positives.rows.numel(), dtype=source.dtype)
    rows = _Running(source.shape[0], source, options) if options.rows else None
    columns = _Running(source.shape[1], source, options) if options.columns else None
    absent = (0,) * (5 if options.details else 2)
    for r0, c0, tile in tiles:
        tiles.exchange("gather", tile, r0, c0, positives, pair_logits)
        _mask(tiles, tile, r0, c0, options)
        if positives.x_ids is not None:
            ids = pointer(positives.x_ids, r0), pointer(positives.y_ids, c0)
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
    tiles = Tiles(source)
    positives = options.positives

    def tile_gradient(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        tile = tiles.logits(r0, r1, c0, c1)
        _mask(tiles, tile, r0, c0, options)
        x = upstream.grad_x, upstream.log_sum_exp_x, upstream.positive_x
        y = upstream.grad_y, upstream.log_sum_exp_y, upstream.positive_y
        sides = [pointer(t, r0) for t in x] + [pointer(t, c0) for t in y]
        ids = pointer(positives.x_ids, r0), pointer(positives.y_ids, c0)
        tiles.launch("info_nce_gradient", tile, *sides, *ids, int(options.multi_positive == "sum"))
        tiles.exchange("scatter", tile, r0, c0, positives, upstream.pair_gradient)
        return tile

    return tile_gradient, BLOCK


def sigmoid_sums(source: Source, positives: Positives) -> tuple[Tensor, Tensor | None]:
    """Row sums of softplus(s), less s where ids are equal; and the logits of the listed positives."""
    tiles = Tiles(source)
    sums = torch.zeros(source.shape[0], dtype=source.dtype)
    pair_logits = None if positives.rows is None else torch.empty(positives.rows.numel(), dtype=source.dtype)
    for r0, c0, tile in tiles:
        tiles.exchange("gather", tile, r0, c0, positives, pair_logits)
        ids = pointer(positives.x_ids, r0), pointer(positives.y_ids, c0)
        tiles.launch("sigmoid_contrastive_sums", tile, *ids, pointer(sums, r0))
    return sums, pair_logits


def sigmoid_gradient(
    source: Source, positives: Positives, upstream: Tensor, pair_logits: Tensor | None
) -> tuple[GradientTile, tuple[int, int]]:
    """dL/ds of the sigmoid loss, tile by tile: upstream_i (sigmoid(s_ij) - 1 for a positive)."""
    tiles = Tiles(source)
    pair_gradient = None
    if pair_logits is not None and positives.rows is not None:
        pair_gradient = -upstream[positives.rows] * torch.sigmoid(-pair_logits)

    def tile_gradient(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        tile = tiles.logits(r0, r1, c0, c1)
        ids = pointer(positives.x_ids, r0), pointer(positives.y_ids, c0)
        tiles.launch("sigmoid_contrastive_gradient", tile, pointer(upstream, r0), *ids)
        tiles.exchange("scatter", tile, r0, c0, positives, pair_gradient)
        return tile

    return tile_gradient, BLOCK
