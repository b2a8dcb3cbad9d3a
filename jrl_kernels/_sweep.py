"""Losses over a matrix of scores that is never stored: where the scores come from, and everything that follows from dL/ds.

A backend gives G = dL/ds one tile at a time; `gradients` multiplies each tile into what it contributes to and forgets it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._checks import accumulation


class Source(NamedTuple):
    """Where logits come from: embeddings x [M, D] and y [N, D], or a matrix of scores [M, N]; times scale (0-d), plus bias."""

    x: Tensor | None
    y: Tensor | None
    scores: Tensor | None
    scale: Tensor
    bias: Tensor | None = None

    @property
    def first(self) -> Tensor:
        tensor = self.x if self.scores is None else self.scores
        assert tensor is not None
        return tensor

    @property
    def shape(self) -> tuple[int, int]:
        if self.scores is not None:
            return self.scores.shape[0], self.scores.shape[1]
        assert self.x is not None and self.y is not None
        return self.x.shape[0], self.y.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return accumulation(self.first.dtype)

    @property
    def device(self) -> torch.device:
        return self.first.device


class GradientTile(Protocol):
    def __call__(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        """dL/ds of logits[r0:r1, c0:c1]; the tensor may be reused by the next call.

        A backend that rounds it to float16 gives it in units of a 0-d tensor, its attribute `unit`.
        """


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, accumulated in the dtype of `out`."""
    if a.dtype == b.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and a.dtype == b.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


class Wanted(NamedTuple):
    """Which gradients the caller asks for."""

    x: bool
    y: bool
    scores: bool
    scale: bool


class Gradients(NamedTuple):
    x: Tensor | None = None  # float32 (float64), as are all of these
    y: Tensor | None = None
    scores: Tensor | None = None  # in the scores' dtype
    scale: Tensor | None = None
    bias: Tensor | None = None


def gradients(
    source: Source, tile: GradientTile, block: tuple[int, int], wanted: Wanted, bias: bool
) -> Gradients:
    """Everything that follows from G = dL/ds, in one sweep over its tiles.

    dx = scale G y, dy = scale G.T x, dscale = sum G * (x y.T) = sum x * (G y), dbias = sum G; tiles in a fixed order, so the
    same bits every run.
    """
    rows, columns = source.shape
    like = source.scale  # in the accumulation dtype
    from_scores = source.scores is not None
    need_x = not from_scores and (wanted.x or wanted.scale)
    dx = like.new_zeros(source.first.shape) if need_x else None
    dy = like.new_zeros(columns, source.first.shape[1]) if wanted.y and not from_scores else None
    dscores = torch.empty_like(source.first) if wanted.scores and from_scores else None
    dscale = like.new_zeros(())
    dbias = like.new_zeros(())
    for r0 in range(0, rows, block[0]):
        r1 = min(r0 + block[0], rows)
        for c0 in range(0, columns, block[1]):
            c1 = min(c0 + block[1], columns)
            g = tile(r0, r1, c0, c1)
            if bias:
                dbias += g.sum(dtype=source.dtype)
            if source.scores is not None:
                if dscores is not None:
                    dscores[r0:r1, c0:c1] = g * source.scale
                if wanted.scale:
                    dscale += (g * source.scores[r0:r1, c0:c1].to(source.dtype)).sum()
                continue
            assert source.x is not None and source.y is not None
            if dx is not None:
                accumulate(dx[r0:r1], g, source.y[c0:c1])
            if dy is not None:
                accumulate(dy[c0:c1], g.T, source.x[r0:r1])
    unit = getattr(tile, "unit", None)
    for total in (dx, dy, dscores, dbias):
        if unit is not None and total is not None:
            total *= unit
    if dx is not None and source.x is not None:
        if wanted.scale:
            dscale = (dx * source.x.to(source.dtype)).sum()
        dx *= source.scale
    if dy is not None:
        dy *= source.scale
    return Gradients(dx, dy, dscores, dscale if wanted.scale else None, dbias if bias else None)
