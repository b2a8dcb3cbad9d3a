"""How the Triton kernels over a matrix of scores are launched: tile sizes by chip, and the operands of one problem."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import _dispatch, _triton
from ._positives import Positives
from ._sweep import Source
from ._triton_tiles import pair_logits_kernel


class Tile(NamedTuple):
    """How a matrix kernel cuts the problem."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By compute capability (_triton.architecture), what multiplies (_triton.precision, or "scores" where nothing does) and the work
# on each logit, since what it keeps in registers must not spill: "whole" (every tile is full), "ragged" (masks), "detailed" (ids
# of pairs are compared, or maxima and expectations kept).
TILES = {
    (8, "half", "whole"): Tile(128, 128, 32, 8, 4),
    (8, "half", "ragged"): Tile(128, 128, 32, 8, 4),
    (8, "half", "detailed"): Tile(64, 64, 32, 8, 4),
    (8, "tf32", "whole"): Tile(128, 128, 32, 8, 3),
    (8, "tf32", "ragged"): Tile(128, 128, 32, 8, 3),
    (8, "tf32", "detailed"): Tile(64, 64, 32, 8, 3),
    (9, "half", "whole"): Tile(128, 128, 64, 8, 3),
    (9, "half", "ragged"): Tile(128, 128, 64, 8, 3),
    (9, "half", "detailed"): Tile(64, 64, 64, 8, 3),
    (9, "tf32", "whole"): Tile(128, 128, 32, 8, 3),
    (9, "tf32", "ragged"): Tile(128, 128, 32, 8, 3),
    (9, "tf32", "detailed"): Tile(64, 64, 32, 8, 3),
    (10, "half", "whole"): Tile(128, 128, 64, 8, 3),
    (10, "half", "ragged"): Tile(128, 64, 64, 8, 3),
    (10, "half", "detailed"): Tile(128, 32, 64, 8, 3),
    (10, "tf32", "whole"): Tile(128, 128, 32, 8, 3),
    (10, "tf32", "ragged"): Tile(128, 64, 32, 8, 3),
    (10, "tf32", "detailed"): Tile(128, 32, 32, 8, 3),
    **{(major, "ieee", work): Tile(64, 64, 16, 4, 3) for major in (8, 9, 10) for work in ("whole", "ragged")},
    **{(major, "ieee", "detailed"): Tile(32, 64, 16, 8, 3) for major in (8, 10)},
    (9, "ieee", "detailed"): Tile(32, 64, 16, 8, 2),
    **{
        (major, "scores", work): Tile(64, 64, 16, 4, 1)
        for major in (8, 9, 10)
        for work in ("whole", "ragged")
    },
    **{(major, "scores", "detailed"): Tile(64, 64, 16, 8, 1) for major in (8, 9, 10)},
}
# What a problem's sides and depth must be multiples of for every tile to be full.
WHOLE = 128, 128, 64
INTERPRETER_TILE = Tile(16, 16, 16, 1, 1)
GROUP = 8
PAIR_BLOCK = 64
INTERPRETER_PAIR_BLOCK = 8

PARTIALS_BYTES = 256 << 20


class Problem:
    """One source of logits and what every matrix kernel on it is launched with."""

    def __init__(self, source: Source, detailed: bool) -> None:
        self.source = source
        self.rows, self.columns = source.shape
        self.depth = 0 if source.x is None else source.x.shape[1]
        self.device = source.device
        kind = "scores" if source.scores is not None else _triton.precision(source.first.dtype)
        whole = all(
            length % unit == 0
            for length, unit in zip((self.rows, self.columns, self.depth), WHOLE, strict=True)
        )
        work = "detailed" if detailed else "whole" if whole else "ragged"
        self.tile = (
            INTERPRETER_TILE
            if _dispatch.interpreting()
            else TILES[_triton.architecture(self.device), kind, work]
        )
        self.x = source.first
        self.y = source.first if source.y is None else source.y
        self.operands = {"x_ptr": self.x, "y_ptr": self.y, "scale_ptr": source.scale}
        self.meta = {
            "FROM_SCORES": source.scores is not None,
            "EVEN_D": self.depth % self.tile.depth == 0,
            "PRECISION": "tf32" if kind == "tf32" else "ieee",
            "BLOCK_M": self.tile.rows,
            "BLOCK_N": self.tile.columns,
            "BLOCK_D": self.tile.depth,
            "GROUP": GROUP,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }

    def grid(self, rows: int, columns: int) -> tuple[int]:
        return (triton.cdiv(rows, self.tile.rows) * triton.cdiv(columns, self.tile.columns),)

    def column_chunk(self, planes: int) -> int:
        """How many columns to sweep at a time so that the partials of rows and columns stay within PARTIALS_BYTES."""
        row_bytes = 4 * planes * self.rows / self.tile.columns
        column_bytes = 4 * planes * triton.cdiv(self.rows, self.tile.rows)
        tiles = int(PARTIALS_BYTES / (row_bytes + column_bytes)) // self.tile.columns
        return min(self.columns, max(1, tiles) * self.tile.columns)

    def pair_logits(self, positives: Positives) -> Tensor | None:
        if positives.rows is None or positives.columns is None:
            return None
        pairs = positives.rows.numel()
        out = torch.empty(pairs, dtype=torch.float32, device=self.device)
        if pairs > 0:
            bias = self.source.bias
            block = INTERPRETER_PAIR_BLOCK if _dispatch.interpreting() else PAIR_BLOCK
            pair_logits_kernel[(triton.cdiv(pairs, block),)](
                **self.operands,
                bias_ptr=bias,
                pair_rows_ptr=positives.rows.contiguous(),
                pair_columns_ptr=positives.columns.contiguous(),
                out_ptr=out,
                pairs=pairs,
                rows=self.rows,
                columns=self.columns,
                depth=self.depth,
                BIAS=bias is not None,
                BLOCK=block,
                num_warps=8,
                **{
                    name: self.meta[name]
                    for name in ("FROM_SCORES", "EVEN_D", "PRECISION", "BLOCK_D", "num_stages")
                },
            )
        return out
