"""The Triton backend: launches the kernels of triton_hinge on NVIDIA GPUs.

No launch reads the GPU's memory or depends on what it holds, so every function here can be captured in a CUDA graph. Forward and
backward compute a score with the same instructions in the same order, so that both count the same violations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ... import _triton_order
from ..._positives import Positives
from ..._sweep import GradientTile, Source
from ..._triton_launch import Problem
from ..._triton_order import accumulate_gradients as accumulate_order  # noqa: F401  (part of a backend's contract)
from .sweep import Options, Side, pair_scores
from .triton_hinge import (
    ranking_loss_gradient_kernel,
    ranking_loss_hardest_kernel,
    ranking_loss_hardest_reduce_kernel,
    ranking_loss_sums_kernel,
    ranking_loss_sums_reduce_kernel,
)

REDUCE = {"BLOCK": 128, "BLOCK_SLOTS": 16, "num_warps": 4}
BUFFER_BYTES = 256 << 20
# In elements: Triton and cuBLAS move whole vectors only where they know that every row begins at a multiple of one.
ALIGNMENT = 16
# Half-precision G is stored in units of its largest upstream gradient over this: 2**14 at most, and exact where all are equal.
HALF_TOP = 2.0**13

Area = tuple[int, int, int, int]


def prepare(tensor: Tensor) -> Tensor:
    """Matrix operands as they are, rows contiguous."""
    return tensor.contiguous()


def _pad(length: int, unit: int) -> int:
    return triton.cdiv(length, unit) * unit


def _block(rows: int, columns: int, itemsize: int, unit: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block of at most BUFFER_BYTES: all, or about square, since each reads and writes both gradients."""
    rows, columns = max(rows, 1), _pad(max(columns, 1), ALIGNMENT)
    elements = BUFFER_BYTES // itemsize
    if rows * columns <= elements:
        return rows, columns
    width = min(columns, _pad(max(math.isqrt(elements) - unit[1], elements // rows - unit[1], 1), unit[1]))
    return min(rows, max(elements // width // unit[0], 1) * unit[0]), width


class _Scores:
    """The scores of one block at a time, as operands of the kernels."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self.buffer: Tensor | None = None
        launched = source
        if options.metric == "order":
            # Nothing multiplies: a kernel of their own writes the scores of a block, and the others read them.
            block = _block(*source.shape, 4, (64, 64))
            self.buffer = torch.empty(block[0] * block[1], dtype=torch.float32, device=source.device)
            launched = Source(None, None, self.buffer.view(block), source.scale)
            self.order_block = block
        self.problem = Problem(launched, options.hardest or options.exclude_x is not None)

    def arguments(self, area: Area) -> dict[str, Any]:
        r0, r1, c0, c1 = area
        source, options, problem = self.source, self.options, self.problem
        if self.buffer is not None:
            assert source.x is not None and source.y is not None
            x = y = self.buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
            _triton_order.scores(source.x[r0:r1], source.y[c0:c1], x)
        elif source.scores is not None:
            x = y = source.scores[r0:, c0:]
        else:
            assert source.x is not None and source.y is not None
            x, y = source.x[r0:], source.y[c0:]
        stride = source.shape[1] if self.buffer is None else c1 - c0
        exclude_x, exclude_y = options.exclude_x, options.exclude_y
        return {
            "x_ptr": x,
            "y_ptr": y,
            "scale_ptr": source.scale,
            "x_exclude_ptr": None if exclude_x is None else exclude_x[r0:],
            "y_exclude_ptr": None if exclude_y is None else exclude_y[c0:],
            "rows": r1 - r0,
            "columns": c1 - c0,
            "stride": stride,
            "depth": problem.depth,
            "paired_rows": min(max(options.pairs - r0, 0), r1 - r0),
            "paired_columns": min(max(options.pairs - c0, 0), c1 - c0),
            "diagonal": r0 - c0 - options.shift,
            "EXCLUDE": exclude_x is not None,
            **problem.meta,
        }


def positive_scores(source: Source, options: Options) -> Tensor:
    """s_ii of the rows that have a positive."""
    if options.metric == "order":
        assert source.x is not None and source.y is not None
        x, y = source.x[: options.pairs], source.y[: options.pairs]
        return pair_scores(options.metric, x.float(), y.float())
    with torch.cuda.device_of(source.first):
        diagonal = torch.arange(options.pairs, device=source.device)
        found = Problem(source, options.exclude_x is not None).pair_logits(
            Positives(rows=diagonal, columns=diagonal)
        )
    assert found is not None
    return found


def statistics(source: Source, options: Options, base: Tensor) -> tuple[Side | None, Side | None]:
    """One sweep over the scores: sums and numbers of violations, or the hardest candidates."""
    value, number = (-torch.inf, -1) if options.hardest else (0.0, 0)
    rows, columns = (
        Side(
            torch.full((options.pairs,), value, device=source.device),
            torch.full((options.pairs,), number, device=source.device),
        )
        if wanted
        else None
        for wanted in (options.rows, options.columns)
    )
    if options.pairs > 0 and 0 not in source.shape:
        with torch.cuda.device_of(source.first):
            _sweep(_Scores(source, options), base, rows, columns)
    return rows, columns


class _Results:
    """One side's results, and the partials of a block that become them."""

    def __init__(self, side: Side, longest: int, across: int, tile: int, hardest: bool) -> None:
        self.side, self.tile = side, tile
        self.kernel = ranking_loss_hardest_reduce_kernel if hardest else ranking_loss_sums_reduce_kernel
        slots = triton.cdiv(across, tile)
        self.values = side.value.new_empty(slots, longest)
        self.numbers = side.number.new_empty(slots, longest, dtype=torch.int32)

    def reduce(self, start: int, length: int, across: int, origin: int, carried: bool) -> None:
        """Partials of `length` rows (columns) from `start`, over `across` columns (rows) whose indices begin at `origin`."""
        self.kernel[(triton.cdiv(length, REDUCE["BLOCK"]),)](
            values_ptr=self.values,
            numbers_ptr=self.numbers,
            value_ptr=self.side.value[start:],
            number_ptr=self.side.number[start:],
            slots=triton.cdiv(across, self.tile),
            length=length,
            origin=origin,
            CARRIED=carried,
            **REDUCE,
        )


def _sweep(scores: _Scores, base: Tensor, rows: Side | None, columns: Side | None) -> None:
    options, problem = scores.options, scores.problem
    tile = problem.tile
    # Only a column that has a positive looks at the rows that have none, and the reverse.
    height = options.pairs if columns is None else scores.source.shape[0]
    width = options.pairs if rows is None else scores.source.shape[1]
    longest = (height, problem.column_chunk(2)) if scores.buffer is None else scores.order_block
    block = min(longest[0], height), min(longest[1], width)
    by_row = None if rows is None else _Results(rows, *block, tile.columns, options.hardest)
    by_column = None if columns is None else _Results(columns, *block[::-1], tile.rows, options.hardest)
    kernel = ranking_loss_hardest_kernel if options.hardest else ranking_loss_sums_kernel
    for r0 in range(0, height, block[0]):
        for c0 in range(0, width, block[1]):
            row_side = by_row if r0 < options.pairs else None
            column_side = by_column if c0 < options.pairs else None
            if row_side is None and column_side is None:
                continue
            area = scores.arguments((r0, min(r0 + block[0], height), c0, min(c0 + block[1], width)))
            bases = {} if options.hardest else {"row_base_ptr": base[r0:], "column_base_ptr": base[c0:]}
            kernel[problem.grid(area["rows"], area["columns"])](
                **area,
                **bases,
                row_values_ptr=None if row_side is None else row_side.values,
                row_numbers_ptr=None if row_side is None else row_side.numbers,
                column_values_ptr=None if column_side is None else column_side.values,
                column_numbers_ptr=None if column_side is None else column_side.numbers,
                ROWS=row_side is not None,
                COLUMNS=column_side is not None,
            )
            if row_side is not None:
                row_side.reduce(r0, area["paired_rows"], area["columns"], c0 + options.shift, c0 > 0)
            if column_side is not None:
                column_side.reduce(c0, area["paired_columns"], area["rows"], r0, r0 > 0)


class _Gradient:
    """G = dL/ds of one block at a time, in a buffer that every block reuses; in units of `unit` where that is not None."""

    def __init__(
        self, source: Source, options: Options, base: Tensor, grad_x: Tensor | None, grad_y: Tensor | None
    ) -> None:
        self.scores = _Scores(source, options)
        self.base, self.grad_x, self.grad_y = base, grad_x, grad_y
        summed = source.scores is not None or options.metric == "order"
        self.dtype = torch.float32 if summed else source.first.dtype
        self.unit: Tensor | None = None
        if self.dtype != torch.float32:
            self.unit = torch.ones((), device=source.device)
            tops = [t.abs().amax() for t in (grad_x, grad_y) if t is not None and t.numel() > 0]
            if tops:
                top = torch.stack(tops).amax()
                self.unit = torch.where(top == 0, self.unit, top / HALF_TOP)
        tile = self.scores.problem.tile
        if self.scores.buffer is None:
            self.block = _block(*source.shape, self.dtype.itemsize, (tile.rows, tile.columns))
        else:
            self.block = self.scores.order_block
        self.stride = _pad(self.block[1], ALIGNMENT)
        self.buffer = torch.empty(self.block[0] * self.stride, dtype=self.dtype, device=source.device)

    def __call__(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        problem = self.scores.problem
        with torch.cuda.device_of(self.buffer):
            ranking_loss_gradient_kernel[problem.grid(r1 - r0, c1 - c0)](
                **self.scores.arguments((r0, r1, c0, c1)),
                row_base_ptr=self.base[r0:],
                column_base_ptr=self.base[c0:],
                grad_x_ptr=None if self.grad_x is None else self.grad_x[r0:],
                grad_y_ptr=None if self.grad_y is None else self.grad_y[c0:],
                unit_ptr=self.unit,
                out_ptr=self.buffer,
                out_stride=self.stride,
                ROWS=self.grad_x is not None,
                COLUMNS=self.grad_y is not None,
                UNIT=self.unit is not None,
            )
        return self.buffer.as_strided((r1 - r0, c1 - c0), (self.stride, 1))


def gradient(
    source: Source, options: Options, base: Tensor, grad_x: Tensor | None, grad_y: Tensor | None
) -> tuple[GradientTile, tuple[int, int]]:
    """dL/ds of the sum of violations, block by block; zero on the diagonal."""
    made = _Gradient(source, options, base, grad_x, grad_y)
    return made, made.block
