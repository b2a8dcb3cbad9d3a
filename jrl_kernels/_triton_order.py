"""Order scores -E, E_mn = sum_d max(0, y_nd - x_md)^2, of a tile of pairs on a GPU, and their gradients: Triton kernels.

Nothing [m, n, d] exists: a program keeps its tile of sums in registers while it walks along the axis that it sums over.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _dispatch, _triton  # noqa: F401  (_triton mends the interpreter)

SCORES_TILE = 64, 64
GRADIENT_TILE = 32, 64
INTERPRETER_TILE = 16, 16


@triton.jit
def excess(y, x):
    return tl.maximum(y - x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def order_scores_kernel(
    x_ptr, y_ptr, out_ptr, rows, columns, depth, out_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One tile of scores from x [D, rows] and y [D, columns]."""
    column_tiles = tl.cdiv(columns, BLOCK_N)
    row = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)
    y_at = y_ptr + tl.minimum(column, columns - 1).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for _ in range(depth):
        x = tl.load(x_at).to(tl.float32)
        y = tl.load(y_at).to(tl.float32)
        v = excess(y[None, :], x[:, None])
        total += v * v
        x_at += rows
        y_at += columns
    offset = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + offset, (-total).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def order_gradient_kernel(
    g_ptr, own_ptr, other_ptr, target_ptr, own_count, other_count, depth, own_stride, other_stride,
    OTHERS_ARE_Y: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """target [own_count, D] += 2 sum_o g v where the others are y, -= where they are x; g's strides are those of (own, other)."""
    depth_tiles = tl.cdiv(depth, BLOCK_D)
    row = (tl.program_id(0) // depth_tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    d = tl.program_id(0) % depth_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    row_inside, d_inside = row < own_count, d < depth
    inside = row_inside[:, None] & d_inside[None, :]
    at = row[:, None] * depth + d[None, :]
    own = tl.load(own_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g_at = g_ptr + row * own_stride
    other_at = other_ptr + d
    total = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    for _ in range(other_count):
        g = tl.load(g_at, mask=row_inside, other=0.0).to(tl.float32)
        other = tl.load(other_at, mask=d_inside, other=0.0).to(tl.float32)
        v = excess(other[None, :], own) if OTHERS_ARE_Y else excess(own, other[None, :])
        total += g[:, None] * v
        g_at += other_stride
        other_at += depth
    before = tl.load(target_ptr + at, mask=inside, other=0.0)
    tl.store(target_ptr + at, before + (2.0 if OTHERS_ARE_Y else -2.0) * total, mask=inside)


def scores(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out [m, n] = -E of x [m, D] and y [n, D]; rows of `out`, float32, may lie apart."""
    if out.numel() == 0:
        return
    block = INTERPRETER_TILE if _dispatch.interpreting() else SCORES_TILE
    rows, columns = out.shape
    # Transposed, neighbouring threads read neighbouring numbers at every step along D.
    order_scores_kernel[(triton.cdiv(rows, block[0]) * triton.cdiv(columns, block[1]),)](
        x_ptr=x.T.contiguous(),
        y_ptr=y.T.contiguous(),
        out_ptr=out,
        rows=rows,
        columns=columns,
        depth=x.shape[1],
        out_stride=out.stride(0),
        BLOCK_M=block[0],
        BLOCK_N=block[1],
        num_warps=4,
    )


def accumulate_gradients(g: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
    """With G = dL/dS [m, n] and v = max(0, y - x): dx += sum_n 2 G v, dy -= sum_m 2 G v, float32; rows of `g` may lie apart."""
    block = INTERPRETER_TILE if _dispatch.interpreting() else GRADIENT_TILE
    x, y = x.contiguous(), y.contiguous()
    depth = x.shape[1]
    for target, own, other, strides in ((dx, x, y, g.stride()), (dy, y, x, g.stride()[::-1])):
        if target is not None and target.numel() > 0:
            order_gradient_kernel[(triton.cdiv(len(own), block[0]) * triton.cdiv(depth, block[1]),)](
                g_ptr=g,
                own_ptr=own,
                other_ptr=other,
                target_ptr=target,
                own_count=len(own),
                other_count=len(other),
                depth=depth,
                own_stride=strides[0],
                other_stride=strides[1],
                OTHERS_ARE_Y=target is dx,
                BLOCK=block[0],
                BLOCK_D=block[1],
                num_warps=4,
            )
