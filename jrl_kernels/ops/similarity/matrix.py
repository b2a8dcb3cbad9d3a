"""similarity_matrix: all similarities of two sets of embeddings, and the operator of its order metric."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks, _dispatch
from ..._operators import register
from . import reference
from .backends import BACKENDS, ORDER_BACKENDS

METRICS = ("cosine", "dot", "order")


def similarity_matrix(
    x: Tensor, y: Tensor, *, metric: str = "cosine", scale: float | Tensor = 1.0, backend: str = "auto"
) -> Tensor:
    """Similarity of every row of x with every row of y::

        S_mn = scale x_m . y_n                             metric="dot"
        S_mn = scale x_m . y_n / (|x_m| |y_n|)             metric="cosine"
        S_mn = - scale sum_d max(0, y_nd - x_md)^2         metric="order"

    Dot products and cosines are torch.matmul, in the inputs' dtype and under autocast in its dtype, whatever the backend: no
    kernel beats it where the matrix is to be stored. "order" is the order violation of Vendrov et al. 2016, where x is the image
    and y the sentence above it (they take absolute values of unit vectors first); unlike theirs, nothing [M, N, D] is made.

    Args:
        x: [..., M, D], float32, bfloat16, float16 or float64; for "order" float64 only on "reference" and "cpu".
        y: [..., N, D], like x; leading axes are broadcast.
        metric: "cosine" (norms below 1e-12 count as 1e-12), "dot" or "order".
        scale: a number or a 0-d tensor (with gradient).
        backend: "auto", "reference", "cpu" or "triton"; it matters to "order" alone ("cuda" is taken for the other metrics).

    Returns:
        [..., M, N], in the inputs' dtype; for "order" in float32 (float64), which autocast does not change.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: x, y, scale; twice differentiable but for "order" in a fused backend.
    """
    op = "similarity_matrix"
    for name, value in (("x", x), ("y", y)):
        _checks.tensor(op, name, value)
        if value.dtype not in _checks.FLOATS:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
        if value.dim() < 2:
            raise ValueError(f"{op}: {name} must have shape [..., rows, D], got {list(value.shape)}")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"{op}: y must have shape [..., N, {x.shape[-1]}] like x, got {list(y.shape)}")
    _checks.choice(op, "metric", metric, METRICS)
    _checks.same_device(op, "y", y, "x", x)
    if metric != "order":
        x, y = _checks.autocast(x, y)  # type: ignore[assignment]
    _checks.same_dtype(op, "y", y, "x", x)
    try:
        leading = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"{op}: the leading axes of x and y must broadcast, got {list(x.shape)} and {list(y.shape)}"
        ) from None
    factor = _checks.scalar(op, "scale", scale, "x", x)
    if metric != "order":
        _checks.choice(op, "backend", backend, ("auto", *sorted(BACKENDS)))
        if metric == "cosine":
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return (x @ y.mT) * factor
    name = _dispatch.select(op, backend, "similarity_matrix", x)
    if name == "reference":
        return reference.order(x, y) * factor
    sizes = x.shape[-2:], y.shape[-2:]
    x, y = (
        t.expand(*leading, *size).reshape(leading.numel(), *size)
        for t, size in zip((x, y), sizes, strict=True)
    )
    scores: Tensor = torch.ops.jrl.order_similarity_forward(x, y, name)
    return scores.view(*leading, sizes[0][0], sizes[1][0]) * factor


def _forward(x: Tensor, y: Tensor, backend: str) -> Tensor:
    implementation: Any = ORDER_BACKENDS[backend].load()
    out = _fake(x, y, backend)
    x, y = implementation.prepare(x), implementation.prepare(y)
    for group in range(len(x)):
        implementation.order_scores(x[group], y[group], out[group])
    return out


def _fake(x: Tensor, y: Tensor, backend: str) -> Tensor:
    shape = x.shape[0], x.shape[1], y.shape[1]
    return torch.empty(shape, dtype=_checks.accumulation(x.dtype), device=x.device)


def _backward(
    grad: Tensor, x: Tensor, y: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor | None, Tensor | None]:
    implementation: Any = ORDER_BACKENDS[backend].load()
    grad, x, y = grad.contiguous(), implementation.prepare(x), implementation.prepare(y)
    dx = torch.zeros_like(x, dtype=grad.dtype) if wanted[0] else None
    dy = torch.zeros_like(y, dtype=grad.dtype) if wanted[1] else None
    for group in range(len(x)):
        targets = (None if total is None else total[group] for total in (dx, dy))
        implementation.order_gradients(grad[group], x[group], y[group], *targets)
    return dx, dy


register(
    "order_similarity",
    inputs="Tensor x, Tensor y",
    options="str backend",
    outputs=["scores"],
    gradients=["x", "y"],
    forward=_forward,
    fake=_fake,
    backward=_backward,
)
