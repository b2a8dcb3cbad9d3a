"""The Triton backend: launches the kernels of triton_softmax and triton_sigmoid on NVIDIA GPUs.

No launch reads the GPU's memory or depends on what it holds, so every function here can be captured in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..._positives import Positives
from ..._sweep import GradientTile, Source
from ..._triton_launch import Problem
from ..._triton_tiles import scatter_kernel
from .sweep import Axis, Options, Statistics, Upstream
from .triton_sigmoid import (
    sigmoid_contrastive_gradient_kernel,
    sigmoid_contrastive_reduce_kernel,
    sigmoid_contrastive_sums_kernel,
)
from .triton_softmax import info_nce_gradient_kernel, info_nce_reduce_kernel, info_nce_statistics_kernel

REDUCE = {"BLOCK": 128, "BLOCK_SLOTS": 16, "num_warps": 4}
SCATTER_BLOCK = 1024
GRADIENT_BYTES = 256 << 20
# In elements: Triton and cuBLAS move whole vectors only where they know that every row begins at a multiple of one.
GRADIENT_ALIGNMENT = 16
# Where float16 G is stored in units of its bound over this, G reaches 2**14 at most and loses bits below 2**-28 of its bound.
FLOAT16_TOP = 2.0**14


def prepare(tensor: Tensor) -> Tensor:
    """Matrix operands as they are, rows contiguous."""
    return tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _by_id(options: Options) -> bool:
    return options.positives.x_ids is not None or options.exclude_x is not None


def _planes(options: Options) -> tuple[str, int]:
    positives = options.multi_positive if options.positives.x_ids is not None else ""
    return positives, 6 if options.details else 2 if positives else 1


def _axis(results: Tensor, options: Options) -> Axis:
    positive = None if options.positives.x_ids is None else results[1]
    if not options.details:
        return Axis(results[0], positive)
    # The index travels through float32 planes as the bits of an int32.
    argmax = results[3].view(torch.int32).to(torch.int64)
    return Axis(results[0], positive, results[2], argmax, results[4], results[5])


def _nothing(length: int, options: Options, device: torch.device) -> Axis:
    """The sums over no candidates."""
    empty = torch.full((length,), -torch.inf, device=device)
    zero = torch.zeros(length, device=device)
    positive = None if options.positives.x_ids is None else empty if options.multi_positive == "sum" else zero
    if not options.details:
        return Axis(empty, positive)
    return Axis(empty, positive, empty, torch.full((length,), -1, device=device), zero, zero)


def statistics(source: Source, options: Options) -> Statistics:
    """One sweep over the logits: log-sum-exp (and details) of rows and columns, logits of the listed positives."""
    with torch.cuda.device_of(source.first):
        problem = Problem(source, _by_id(options) or options.details)
        pair_logits = problem.pair_logits(options.positives)
        if 0 in source.shape:
            rows, columns = (
                _nothing(length, options, source.device) if wanted else None
                for length, wanted in zip(source.shape, (options.rows, options.columns), strict=True)
            )
            return Statistics(rows, columns, pair_logits)
        row_results, column_results = _sweep(problem, options)
    return Statistics(
        None if row_results is None else _axis(row_results, options),
        None if column_results is None else _axis(column_results, options),
        pair_logits,
    )


def _sweep(problem: Problem, options: Options) -> tuple[Tensor | None, Tensor | None]:
    positives, planes = _planes(options)
    tile = problem.tile
    chunk = problem.column_chunk(planes)
    row_tiles = triton.cdiv(problem.rows, tile.rows)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=problem.device)

    row_results = empty(planes, problem.rows) if options.rows else None
    column_results = empty(planes, problem.columns) if options.columns else None
    row_partials = empty(planes, triton.cdiv(chunk, tile.columns), problem.rows) if options.rows else None
    column_partials = empty(planes, row_tiles, chunk) if options.columns else None
    x_ids, y_ids = _contiguous(options.positives.x_ids), _contiguous(options.positives.y_ids)
    exclude_x, exclude_y = _contiguous(options.exclude_x), _contiguous(options.exclude_y)
    flags = {"POSITIVES": positives, "DETAILS": options.details}
    for start in range(0, problem.columns, chunk):
        end = min(start + chunk, problem.columns)
        info_nce_statistics_kernel[problem.grid(problem.rows, end - start)](
            **problem.operands,
            x_ids_ptr=x_ids,
            y_ids_ptr=y_ids,
            x_exclude_ptr=exclude_x,
            y_exclude_ptr=exclude_y,
            row_partials_ptr=row_partials,
            column_partials_ptr=column_partials,
            rows=problem.rows,
            columns=problem.columns,
            column_start=start,
            column_end=end,
            depth=problem.depth,
            ROWS=options.rows,
            COLUMNS=options.columns,
            EXCLUDE=exclude_x is not None,
            RAGGED=problem.rows % tile.rows != 0 or (end - start) % tile.columns != 0,
            **flags,
            **problem.meta,
        )
        for partials, results, slots, length in (
            (row_partials, row_results, triton.cdiv(end - start, tile.columns), problem.rows),
            (column_partials, column_results, row_tiles, end - start),
        ):
            if results is not None:
                by_row = results is row_results
                info_nce_reduce_kernel[(triton.cdiv(length, REDUCE["BLOCK"]),)](
                    partials_ptr=partials,
                    results_ptr=results if by_row else results[:, start:],
                    slots=slots,
                    length=length,
                    results_length=results.shape[1],
                    CARRIED=by_row and start > 0,
                    **flags,
                    **REDUCE,
                )
    return row_results, column_results


def _pad(length: int, unit: int) -> int:
    return triton.cdiv(length, unit) * unit


class _Gradient:
    """G = dL/ds of one tile at a time, in a buffer that every tile reuses; in units of `unit` where that is not None.

    Half-precision G is an operand of the products that follow. bfloat16 has float32's range; float16 would lose the small entries
    of a mean over many rows, so it is stored in units of a bound of |G|.
    """

    def __init__(
        self, problem: Problem, positives: Positives, pair_gradient: Tensor | None, bounds: list[Tensor]
    ) -> None:
        source = problem.source
        self.problem = problem
        self.positives = positives
        self.pair_gradient = _contiguous(pair_gradient)
        self.dtype = torch.float32 if source.scores is not None else source.first.dtype
        self.unit: Tensor | None = None
        if self.dtype == torch.float16:
            self.unit = torch.ones((), device=source.device)
            # |G| <= |grad_x| + |grad_y| where the losses make it; the pairs' own bound covers any other upstream.
            tops = [t.abs().amax() for t in (*bounds, self.pair_gradient) if t is not None and t.numel() > 0]
            if tops:
                bound = torch.stack(tops).sum() / FLOAT16_TOP
                self.unit = torch.where(bound == 0, self.unit, bound)
        self.block = self._block()
        rows, columns = (min(side, length) for side, length in zip(self.block, source.shape, strict=True))
        self.stride = _pad(columns, GRADIENT_ALIGNMENT)
        self.buffer = torch.empty(rows * self.stride, dtype=self.dtype, device=source.device)

    def _block(self) -> tuple[int, int]:
        """Rows and columns of a tile: square where the problem is divided, since each tile reads and writes both gradients."""
        rows, columns = max(self.problem.rows, 1), _pad(max(self.problem.columns, 1), GRADIENT_ALIGNMENT)
        tile = self.problem.tile
        elements = GRADIENT_BYTES // self.dtype.itemsize
        if rows * columns <= elements:
            return rows, columns
        longest = max(math.isqrt(elements), elements // columns) // tile.rows * tile.rows
        height = min(_pad(triton.cdiv(rows, triton.cdiv(rows, longest)), tile.rows), longest)
        widest = max(elements // min(height, rows) // tile.columns, 1) * tile.columns
        width = min(_pad(triton.cdiv(columns, triton.cdiv(columns, widest)), tile.columns), widest)
        return height, width

    def launch(self, area: dict[str, int], out: Tensor) -> None:
        raise NotImplementedError

    def __call__(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        area = {
            "row_start": r0,
            "row_end": r1,
            "column_start": c0,
            "column_end": c1,
            "out_stride": self.stride,
        }
        with torch.cuda.device_of(self.buffer):
            self.launch(area, self.buffer)
            pairs = self.positives.rows
            if pairs is not None and self.pair_gradient is not None and pairs.numel() > 0:
                scatter_kernel[(triton.cdiv(pairs.numel(), SCATTER_BLOCK),)](
                    pair_rows_ptr=pairs.contiguous(),
                    pair_columns_ptr=_contiguous(self.positives.columns),
                    value_ptr=self.pair_gradient,
                    unit_ptr=self.unit,
                    out_ptr=self.buffer,
                    pairs=pairs.numel(),
                    **area,
                    UNIT=self.unit is not None,
                    BLOCK=SCATTER_BLOCK,
                )
        return self.buffer.as_strided((r1 - r0, c1 - c0), (self.stride, 1))


class _SoftmaxGradient(_Gradient):
    def __init__(self, source: Source, options: Options, upstream: Upstream) -> None:
        bounds = [grad for grad in (upstream.grad_x, upstream.grad_y) if grad is not None]
        super().__init__(Problem(source, _by_id(options)), options.positives, upstream.pair_gradient, bounds)
        self.arguments = {
            "x_ids_ptr": _contiguous(options.positives.x_ids),
            "y_ids_ptr": _contiguous(options.positives.y_ids),
            "x_exclude_ptr": _contiguous(options.exclude_x),
            "y_exclude_ptr": _contiguous(options.exclude_y),
            "grad_x_ptr": _contiguous(upstream.grad_x),
            "log_sum_exp_x_ptr": _contiguous(upstream.log_sum_exp_x),
            "positive_x_ptr": _contiguous(upstream.positive_x),
            "grad_y_ptr": _contiguous(upstream.grad_y),
            "log_sum_exp_y_ptr": _contiguous(upstream.log_sum_exp_y),
            "positive_y_ptr": _contiguous(upstream.positive_y),
            "ROWS": upstream.grad_x is not None,
            "COLUMNS": upstream.grad_y is not None,
            "POSITIVES": options.multi_positive if options.positives.x_ids is not None else "",
            "EXCLUDE": options.exclude_x is not None,
        }

    def launch(self, area: dict[str, int], out: Tensor) -> None:
        problem = self.problem
        info_nce_gradient_kernel[
            problem.grid(area["row_end"] - area["row_start"], area["column_end"] - area["column_start"])
        ](
            **problem.operands,
            **self.arguments,
            unit_ptr=self.unit,
            out_ptr=out,
            columns=problem.columns,
            depth=problem.depth,
            UNIT=self.unit is not None,
            **area,
            **problem.meta,
        )


def softmax_gradient(
    source: Source, options: Options, upstream: Upstream
) -> tuple[GradientTile, tuple[int, int]]:
    """dL/ds of a softmax loss, tile by tile."""
    gradient = _SoftmaxGradient(source, options, upstream)
    return gradient, gradient.block


def sigmoid_sums(source: Source, positives: Positives) -> tuple[Tensor, Tensor | None]:
    """Row sums of softplus(s), less s where ids are equal; and the logits of the listed positives."""
    with torch.cuda.device_of(source.first):
        problem = Problem(source, positives.x_ids is not None)
        pair_logits = problem.pair_logits(positives)
        sums = torch.zeros(problem.rows, dtype=torch.float32, device=problem.device)
        if 0 in source.shape:
            return sums, pair_logits
        chunk = problem.column_chunk(planes=1)
        slots = triton.cdiv(chunk, problem.tile.columns)
        partials = torch.empty(slots, problem.rows, dtype=torch.float32, device=problem.device)
        for start in range(0, problem.columns, chunk):
            end = min(start + chunk, problem.columns)
            sigmoid_contrastive_sums_kernel[problem.grid(problem.rows, end - start)](
                **problem.operands,
                bias_ptr=source.bias,
                x_ids_ptr=_contiguous(positives.x_ids),
                y_ids_ptr=_contiguous(positives.y_ids),
                row_partials_ptr=partials,
                rows=problem.rows,
                columns=problem.columns,
                column_start=start,
                column_end=end,
                depth=problem.depth,
                BIAS=source.bias is not None,
                POSITIVES=positives.x_ids is not None,
                **problem.meta,
            )
            sigmoid_contrastive_reduce_kernel[(triton.cdiv(problem.rows, REDUCE["BLOCK"]),)](
                partials_ptr=partials,
                results_ptr=sums,
                slots=triton.cdiv(end - start, problem.tile.columns),
                length=problem.rows,
                CARRIED=start > 0,
                **REDUCE,
            )
    return sums, pair_logits


class _SigmoidGradient(_Gradient):
    def __init__(
        self, source: Source, positives: Positives, upstream: Tensor, pair_logits: Tensor | None
    ) -> None:
        pair_gradient = None
        if pair_logits is not None and positives.rows is not None:
            pair_gradient = -upstream[positives.rows] * torch.sigmoid(-pair_logits)
        super().__init__(Problem(source, positives.x_ids is not None), positives, pair_gradient, [upstream])
        self.arguments = {
            "bias_ptr": source.bias,
            "x_ids_ptr": _contiguous(positives.x_ids),
            "y_ids_ptr": _contiguous(positives.y_ids),
            "upstream_ptr": upstream.contiguous(),
            "BIAS": source.bias is not None,
            "POSITIVES": positives.x_ids is not None,
        }

    def launch(self, area: dict[str, int], out: Tensor) -> None:
        problem = self.problem
        sigmoid_contrastive_gradient_kernel[
            problem.grid(area["row_end"] - area["row_start"], area["column_end"] - area["column_start"])
        ](
            **problem.operands,
            **self.arguments,
            unit_ptr=self.unit,
            out_ptr=out,
            columns=problem.columns,
            depth=problem.depth,
            UNIT=self.unit is not None,
            **area,
            **problem.meta,
        )


def sigmoid_gradient(
    source: Source, positives: Positives, upstream: Tensor, pair_logits: Tensor | None
) -> tuple[GradientTile, tuple[int, int]]:
    """dL/ds of the sigmoid loss, tile by tile: upstream_i (sigmoid(s_ij) - 1 for a positive)."""
    gradient = _SigmoidGradient(source, positives, upstream, pair_logits)
    return gradient, gradient.block
