"""The Triton backend: cuBLAS fills a tile of scores, Triton kernels search it, one program a row."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _dispatch, _triton, _triton_order
from . import gpu
from .gpu import BLOCK as BLOCK
from .gpu import nothing as nothing
from .gpu import prepare as prepare
from .search import Listed, Pairs, Rounding

BLOCK_COLUMNS, INTERPRETER_BLOCK = 256, 16
NO_COLUMN = tl.constexpr(2147483647)
NOTHING = tl.constexpr(-2147483648)


@triton.jit
def row_sum(x_ptr, y_ptr, i, j, depth, ORDER: tl.constexpr, BLOCK_D: tl.constexpr):
    """x_i . y_j, or sum_d max(0, y_jd - x_id)^2, in float64; rows of equal content have equal sums."""
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float64)
    for start in range(0, depth, BLOCK_D):
        inside = d + start < depth
        x = tl.load(x_ptr + i * depth + start + d, mask=inside, other=0.0).to(tl.float64)
        y = tl.load(y_ptr + j * depth + start + d, mask=inside, other=0.0).to(tl.float64)
        if ORDER:
            v = tl.where(y - x < 0.0, 0.0, y - x)
            total += v * v
        else:
            total += x * y
    return tl.sum(total, 0)


@triton.jit
def exact_score(
    x_ptr, y_ptr, x_norm_ptr, y_norm_ptr, a_ptr, b_ptr, i, j, depth, other_depth,
    METRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A score in float64."""
    s = row_sum(x_ptr, y_ptr, i, j, depth, METRIC == "order", BLOCK_D)
    if METRIC == "order":
        s = -s
    elif METRIC == "cosine":
        s = s / (tl.load(x_norm_ptr + i) * tl.load(y_norm_ptr + j))
    elif METRIC == "min" or METRIC == "max":
        t = row_sum(a_ptr, b_ptr, i, j, other_depth, False, BLOCK_D)
        lesser = s < t
        if METRIC == "max":
            lesser = s > t
        # A comparison with NaN is false, and the sum carries it.
        s = tl.where((s == s) & (t == t), tl.where(lesser, s, t), s + t)
    return s


@triton.jit
def tile_scores(
    s_ptr, row_scale_ptr, column_scale_ptr, row_error_ptr, column_error_ptr, relative, row, i, c0, j, columns,
):  # fmt: skip
    """Entries of a row of a tile as scores, and how far rounding can have moved them."""
    inside = j < columns
    entry = tl.load(s_ptr + row.to(tl.int64) * columns + j, mask=inside, other=0.0)
    column_scale = tl.load(column_scale_ptr + c0 + j, mask=inside, other=0.0)
    column_error = tl.load(column_error_ptr + c0 + j, mask=inside, other=0.0)
    score = entry * (tl.load(row_scale_ptr + i) * column_scale)
    return score, tl.load(row_error_ptr + i) * column_error + relative * tl.abs(score)


@triton.jit
def similarity_best_kernel(
    x_ptr, y_ptr, x_norm_ptr, y_norm_ptr, starts_ptr, ends_ptr, listed_ptr, best_ptr, depth,
    METRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best listed column of each row: -inf without one, NaN with a NaN."""
    i = tl.program_id(0).to(tl.int64)
    best = tl.full([], float("-inf"), tl.float64)
    for p in range(tl.load(starts_ptr + i), tl.load(ends_ptr + i)):
        j = tl.load(listed_ptr + p)
        s = exact_score(
            x_ptr, y_ptr, x_norm_ptr, y_norm_ptr, x_ptr, y_ptr, i, j, depth, depth, METRIC, BLOCK_D
        )
        best = tl.where((best != best) | (s <= best), best, s)
    tl.store(best_ptr + i, best)


@triton.jit
def is_listed(listed_ptr, begin, end, column):
    lower, upper = begin, end
    while lower < upper:
        middle = lower + (upper - lower) // 2
        before = tl.load(listed_ptr + middle) < column
        lower = tl.where(before, middle + 1, lower)
        upper = tl.where(before, upper, middle)
    return tl.load(listed_ptr + lower, mask=lower < end, other=-1) == column


@triton.jit
def similarity_count_kernel(
    s_ptr, row_scale_ptr, column_scale_ptr, row_error_ptr, column_error_ptr, relative,
    x_ptr, y_ptr, x_norm_ptr, y_norm_ptr, starts_ptr, ends_ptr, listed_ptr, low_ptr, high_ptr, best_ptr, counts_ptr,
    columns, r0, c0, depth, METRIC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds how many columns of the tile are not below the row's best positive and not listed as its positives."""
    row = tl.program_id(0)
    i = (r0 + row).to(tl.int64)
    low, high, best = tl.load(low_ptr + i), tl.load(high_ptr + i), tl.load(best_ptr + i)
    begin, end = tl.load(starts_ptr + i), tl.load(ends_ptr + i)
    total = tl.load(counts_ptr + i)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        score, tolerance = tile_scores(
            s_ptr,
            row_scale_ptr,
            column_scale_ptr,
            row_error_ptr,
            column_error_ptr,
            relative,
            row,
            i,
            c0,
            j,
            columns,
        )
        inside = j < columns
        above = inside & (score - tolerance > high)
        below = score + tolerance < low
        total += tl.sum(above.to(tl.int64), 0)
        unsure = inside & (above == 0) & (below == 0)
        left = tl.sum(unsure.to(tl.int32), 0)
        last = start - 1
        while left > 0:
            last = tl.min(tl.where(unsure & (j > last), j, NO_COLUMN), 0)
            column = (c0 + last).to(tl.int64)
            s = exact_score(
                x_ptr, y_ptr, x_norm_ptr, y_norm_ptr, x_ptr, y_ptr, i, column, depth, depth, METRIC, BLOCK_D
            )
            counts = (s < best) | is_listed(listed_ptr, begin, end, column)
            total += (counts == 0).to(tl.int64)
            left -= 1
    tl.store(counts_ptr + i, total)


@triton.jit
def similarity_select_kernel(
    s_ptr, row_scale_ptr, column_scale_ptr, row_error_ptr, column_error_ptr, relative,
    x_ptr, y_ptr, x_norm_ptr, y_norm_ptr, a_ptr, b_ptr, exclude_x_ptr, exclude_y_ptr, keys_ptr,
    columns, r0, c0, depth, other_depth, k,
    METRIC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Replaces keys of a row, in no order, by larger ones of the tile; pairs with equal exclude ids stay out."""
    row = tl.program_id(0)
    i = (r0 + row).to(tl.int64)
    place = tl.arange(0, BLOCK_K)
    keys = tl.load(keys_ptr + i * k + place, mask=place < k, other=0x7FFFFFFFFFFFFFFF)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        score, tolerance = tile_scores(
            s_ptr,
            row_scale_ptr,
            column_scale_ptr,
            row_error_ptr,
            column_error_ptr,
            relative,
            row,
            i,
            c0,
            j,
            columns,
        )
        smallest = (tl.min(keys, 0) >> 32).to(tl.int32)
        value = tl.where(smallest >= 0, smallest, smallest ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)
        # A score is rounded to float32 before it is compared, which moves it by less than this.
        value = tl.where(smallest == NOTHING, float("-inf"), value - tl.abs(value) * 2.4e-7)
        possible = (j < columns) & ((score + tolerance < value) == 0)
        if exclude_x_ptr is not None:
            others = tl.load(exclude_y_ptr + c0 + j, mask=j < columns, other=0)
            possible = possible & (others != tl.load(exclude_x_ptr + i))
        left = tl.sum(possible.to(tl.int32), 0)
        last = start - 1
        while left > 0:
            last = tl.min(tl.where(possible & (j > last), j, NO_COLUMN), 0)
            column = (c0 + last).to(tl.int64)
            s = exact_score(
                x_ptr,
                y_ptr,
                x_norm_ptr,
                y_norm_ptr,
                a_ptr,
                b_ptr,
                i,
                column,
                depth,
                other_depth,
                METRIC,
                BLOCK_D,
            ).to(tl.float32)
            bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
            bits = tl.where(s == s, bits, 0x7FC00000)
            ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
            key = (ordered << 32) | (0xFFFFFFFF - column)
            least = tl.min(keys, 0)
            keys = tl.where((keys == least) & (key > least), key, keys)
            left -= 1
    tl.store(keys_ptr + i * k + place, keys, mask=place < k)


def order_scores(x: Tensor, y: Tensor, out: Tensor) -> None:
    _triton_order.scores(x, y, out)


def order_gradients(g: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
    _triton_order.accumulate_gradients(g, x, y, dx, dy)


def fill(x: Tensor, y: Tensor, metric: str, tile: Tensor) -> None:
    if metric == "order":
        _triton_order.scores(x, y, tile)
    else:
        gpu.product(x, y, tile)


def _depth_block(depth: int) -> int:
    return min(64, max(16, triton.next_power_of_2(depth)))


def _tile(tile: Tensor, r0: int, c0: int, pairs: Pairs, bounds: Rounding) -> dict:
    names = "row_scale_ptr", "column_scale_ptr", "row_error_ptr", "column_error_ptr"
    return {
        "s_ptr": tile,
        **dict(zip(names, bounds.vectors, strict=True)),
        "relative": bounds.relative,
        "x_ptr": pairs.x,
        "y_ptr": pairs.y,
        "x_norm_ptr": bounds.x_norm,
        "y_norm_ptr": bounds.y_norm,
        "columns": tile.shape[1],
        "r0": r0,
        "c0": c0,
        "depth": pairs.x.shape[1],
        "METRIC": pairs.metric,
        "BLOCK": INTERPRETER_BLOCK if _dispatch.interpreting() else BLOCK_COLUMNS,
        "BLOCK_D": _depth_block(pairs.x.shape[1]),
        "num_warps": 2,
    }


def best(pairs: Pairs, bounds: Rounding, group: Listed) -> Tensor:
    """The best positive of each row, in float64."""
    out = torch.empty(pairs.shape[0], dtype=torch.float64, device=pairs.x.device)
    if len(out):
        similarity_best_kernel[(len(out),)](
            x_ptr=pairs.x,
            y_ptr=pairs.y,
            x_norm_ptr=bounds.x_norm,
            y_norm_ptr=bounds.y_norm,
            starts_ptr=group.starts,
            ends_ptr=group.ends,
            listed_ptr=group.columns,
            best_ptr=out,
            depth=pairs.x.shape[1],
            METRIC=pairs.metric,
            BLOCK_D=_depth_block(pairs.x.shape[1]),
            num_warps=1,
        )
    return out


def count(
    tile: Tensor, r0: int, c0: int, pairs: Pairs, bounds: Rounding, group: Listed,
    low: Tensor, high: Tensor, best: Tensor, counts: Tensor,
) -> None:  # fmt: skip
    """Adds to `counts` what a tile has that is not below the best positive."""
    similarity_count_kernel[(tile.shape[0],)](
        **_tile(tile, r0, c0, pairs, bounds),
        starts_ptr=group.starts,
        ends_ptr=group.ends,
        listed_ptr=group.columns,
        low_ptr=low,
        high_ptr=high,
        best_ptr=best,
        counts_ptr=counts,
    )


def _select_warps(block_k: int, device: torch.device) -> int:
    # The most keys do not fit the registers of two warps on 10.0, nor those of four on 9.0 without spilling.
    many = block_k > 1024 and not _dispatch.interpreting() and _triton.architecture(device) == 10
    return 4 if many else 2


def select(
    tile: Tensor, r0: int, c0: int, pairs: Pairs, bounds: Rounding, exclude: tuple[Tensor, Tensor] | None, keys: Tensor
) -> None:  # fmt: skip
    """Merges a tile's entries into the keys."""
    exclude_x, exclude_y = exclude or (None, None)
    block_k = max(16, triton.next_power_of_2(keys.shape[1]))
    similarity_select_kernel[(tile.shape[0],)](
        **{**_tile(tile, r0, c0, pairs, bounds), "num_warps": _select_warps(block_k, tile.device)},
        a_ptr=pairs.a,
        b_ptr=pairs.b,
        exclude_x_ptr=exclude_x,
        exclude_y_ptr=exclude_y,
        keys_ptr=keys,
        other_depth=0 if pairs.a is None else pairs.a.shape[1],
        k=keys.shape[1],
        BLOCK_K=block_k,
    )


def finish(pairs: Pairs, bounds: Rounding, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Exact scores and columns in descending order."""
    return gpu.decode(keys.sort(dim=1, descending=True).values)
