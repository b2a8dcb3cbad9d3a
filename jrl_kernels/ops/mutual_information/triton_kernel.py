"""The Triton backend: launches the kernels of triton_tiles on NVIDIA GPUs. No launch reads the GPU's memory."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..._sweep import GradientTile, Source
from ..._triton_launch import Problem
from .sweep import Images, Upstream
from .triton_tiles import mutual_information_gradient_kernel, mutual_information_sums_kernel

GRADIENT_BYTES = 256 << 20
# In elements: Triton and cuBLAS move whole vectors only where they know that every row begins at a multiple of one.
GRADIENT_ALIGNMENT = 16
# Where float16 G is stored in units of its bound over this, G reaches 2**14 at most and loses bits below 2**-28 of its bound.
FLOAT16_TOP = 2.0**14


def prepare(tensor: Tensor) -> Tensor:
    """Matrix operands as they are, rows contiguous."""
    return tensor.contiguous()


def _sweep(
    source: Source, images: Images, rows: bool, columns: bool, softplus: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Each row's and each column's sum of exp (its log) or of softplus, from the partial sums of every tile."""
    nothing = 0.0 if softplus else -torch.inf
    found = [
        torch.full((length,), nothing, device=source.device) if wanted else None
        for length, wanted in zip(source.shape, (rows, columns), strict=True)
    ]
    if 0 in source.shape:
        return found[0], found[1]
    with torch.cuda.device_of(source.first):
        problem = Problem(source, detailed=softplus)
        chunk = problem.column_chunk(planes=1)
        for start in range(0, problem.columns, chunk):
            end = min(start + chunk, problem.columns)
            tiles = (
                triton.cdiv(problem.rows, problem.tile.rows),
                triton.cdiv(end - start, problem.tile.columns),
            )
            x, y = (
                torch.empty(shape, dtype=torch.float32, device=problem.device) if wanted else None
                for shape, wanted in (((tiles[1], problem.rows), rows), ((tiles[0], end - start), columns))
            )
            mutual_information_sums_kernel[problem.grid(problem.rows, end - start)](
                **problem.operands,
                x_images_ptr=images.x,
                y_images_ptr=images.y,
                row_partials_ptr=x,
                column_partials_ptr=y,
                rows=problem.rows,
                columns=problem.columns,
                column_start=start,
                column_end=end,
                depth=problem.depth,
                SOFTPLUS=softplus,
                ROWS=rows,
                COLUMNS=columns,
                **problem.meta,
            )
            # The partials are a tile's share of the scores: PyTorch reduces them, in an order that is always the same.
            if x is not None and found[0] is not None:
                found[0] = found[0] + x.sum(0) if softplus else torch.logaddexp(found[0], x.logsumexp(0))
            if y is not None and found[1] is not None:
                found[1][start:end] = y.logsumexp(0)
    return found[0], found[1]


def log_sum_exp(
    source: Source, images: Images, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Log-sum-exp over each row's and each column's entries of other images; -inf where there is none."""
    return _sweep(source, images, rows, columns, softplus=False)


def softplus_sums(source: Source, images: Images) -> Tensor:
    """Sum of softplus(u) over each row's entries of other images."""
    sums, _ = _sweep(source, images, True, False, softplus=True)
    assert sums is not None
    return sums


def _pad(length: int, unit: int) -> int:
    return triton.cdiv(length, unit) * unit


class _Gradient:
    """d bound / du of one tile at a time, in a buffer that every tile reuses; in units of `unit` where that is not None.

    It is an operand of the products that follow, in the inputs' dtype. bfloat16 has float32's range; float16 would lose the small
    entries of a mean over many pairs, so it is stored in units of a bound of its size.
    """

    def __init__(self, source: Source, images: Images, upstream: Upstream) -> None:
        # Two directions, or one function for own pairs and another for the rest, keep more in registers than large tiles leave.
        one_direction = (upstream.weight_x is None) != (upstream.weight_y is None)
        self.problem = Problem(source, detailed=not one_direction)
        dtype = source.first.dtype
        self.unit: Tensor | None = None
        if dtype == torch.float16:
            # An own pair's two sigmoids are at most 2, as is the sum of the two sides' probabilities.
            tops = [2 * upstream.own.abs(), upstream.off.abs()]
            tops += [
                w.abs().amax() for w in (upstream.weight_x, upstream.weight_y) if w is not None and w.numel()
            ]
            bound = torch.stack(tops).sum() / FLOAT16_TOP
            self.unit = torch.where(bound == 0, 1.0, bound)
        tile, elements = self.problem.tile, GRADIENT_BYTES // dtype.itemsize
        rows, columns = self.problem.rows, _pad(max(self.problem.columns, 1), GRADIENT_ALIGNMENT)
        width = min(columns, elements // tile.rows // tile.columns * tile.columns)
        self.block = min(max(rows, 1), elements // width // tile.rows * tile.rows), width
        self.buffer = torch.empty(self.block[0] * width, dtype=dtype, device=source.device)
        self.arguments = {
            "x_images_ptr": images.x,
            "y_images_ptr": images.y,
            "own_ptr": upstream.own,
            "off_ptr": upstream.off,
            "log_sum_x_ptr": upstream.log_sum_x,
            "weight_x_ptr": upstream.weight_x,
            "log_sum_y_ptr": upstream.log_sum_y,
            "weight_y_ptr": upstream.weight_y,
            "unit_ptr": self.unit,
            "out_ptr": self.buffer,
            "columns": self.problem.columns,
            "out_stride": width,
            "depth": self.problem.depth,
            "BOUND": upstream.bound,
            "ROWS": upstream.weight_x is not None,
            "COLUMNS": upstream.weight_y is not None,
            "UNIT": self.unit is not None,
        }

    def __call__(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        with torch.cuda.device_of(self.buffer):
            mutual_information_gradient_kernel[self.problem.grid(r1 - r0, c1 - c0)](
                **self.problem.operands,
                **self.arguments,
                row_start=r0,
                row_end=r1,
                column_start=c0,
                column_end=c1,
                **self.problem.meta,
            )
        return self.buffer.as_strided((r1 - r0, c1 - c0), (self.block[1], 1))


def gradient(source: Source, images: Images, upstream: Upstream) -> tuple[GradientTile, tuple[int, int]]:
    """d bound / du, tile by tile."""
    found = _Gradient(source, images, upstream)
    return found, found.block
