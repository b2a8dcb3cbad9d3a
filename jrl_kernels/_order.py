"""Order scores -E, E_mn = sum_d max(0, y_nd - x_md)^2, of a tile of pairs on a CPU, and their gradients: C++ loops."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _extension
from ._extension import pointer


def scores(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out [m, n] = -E of x [m, D] and y [n, D], contiguous float32 or float64; rows of `out` may lie apart."""
    _launch(
        "order_scores", x, pointer(x), pointer(y), len(x), len(y), x.shape[1], pointer(out), out.stride(0)
    )


def accumulate_gradients(g: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
    """With G = dL/dS [m, n] and v = max(0, y - x): dx += sum_n 2 G v, dy -= sum_m 2 G v; rows of `g` may lie apart."""
    sizes = len(x), len(y), x.shape[1]
    _launch(
        "order_gradient", x, pointer(g), g.stride(0), pointer(x), pointer(y), *sizes, pointer(dx), pointer(dy)
    )


def _launch(name: str, like: Tensor, *arguments: int) -> None:
    _extension.launch(f"{name}_{'f64' if like.dtype == torch.float64 else 'f32'}_cpu", *arguments)
