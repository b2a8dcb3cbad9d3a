"""InfoNCE and the sigmoid loss, and the same as people write them in PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jrl_kernels import info_nce, sigmoid_contrastive
from jrl_kernels.ops.info_nce import cases

from ..measure import Step
from .workload import Workload


def _eager_info_nce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * (x @ y.T)
    target = torch.arange(x.shape[0], device=x.device)
    return (F.cross_entropy(logits.float(), target) + F.cross_entropy(logits.T.float(), target)) / 2


def _chunked_info_nce(x: Tensor, y: Tensor, scale: Tensor, chunk: int = 1024) -> Tensor:
    """Rows in checkpointed chunks: O(chunk N) memory for a second forward."""

    def rows(a: Tensor, b: Tensor, start: int) -> Tensor:
        target = torch.arange(start, start + a.shape[0], device=a.device)
        return F.cross_entropy((scale * (a @ b.T)).float(), target, reduction="sum")

    total = x.new_zeros((), dtype=torch.float32)
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(rows, x[part], y, start, use_reentrant=False)
        total = total + checkpoint(rows, y[part], x, start, use_reentrant=False)
    return total / (2 * x.shape[0])


def _sigmoid_inputs(shape: cases.Shape, **options: Any) -> dict[str, Any]:
    arguments = cases.make_inputs(shape, **options)
    return {**arguments, "bias": torch.full_like(arguments["scale"], -10.0).requires_grad_()}


def _eager_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * (x @ y.T) + bias
    sign = 2 * torch.eye(*logits.shape, device=x.device) - 1
    return -F.logsigmoid(sign * logits.float()).sum() / x.shape[0]


def _chunked_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, chunk: int = 1024) -> Tensor:
    def rows(a: Tensor, start: int) -> Tensor:
        logits = (scale * (a @ y.T) + bias).float()
        index = torch.arange(a.shape[0], device=a.device)
        sign = torch.full_like(logits, -1.0).index_put(
            (index, index + start), torch.ones((), device=a.device)
        )
        return -F.logsigmoid(sign * logits).sum()

    total = x.new_zeros((), dtype=torch.float32)
    for start in range(0, x.shape[0], chunk):
        total = total + checkpoint(rows, x[start : start + chunk], start, use_reentrant=False)
    return total / x.shape[0]


def _products(arguments: dict[str, Any], backward: bool) -> Step:
    """One product forward; one recomputed and two more backward."""
    x, y = arguments["x"].detach(), arguments["y"].detach()

    def step() -> None:
        logits = x @ y.T
        if backward:
            x @ y.T
            logits @ y
            logits.T @ x

    return step


WORKLOADS = {
    "info_nce": Workload(
        cases=cases,
        make_inputs=partial(cases.make_inputs, scale=14.0),
        ours=info_nce,
        peers={"eager": _eager_info_nce, "chunked": _chunked_info_nce},
        backends=("cpu", "triton"),
        parity=cases.Shape(384, 384, 64),
        products=_products,
    ),
    "sigmoid_contrastive": Workload(
        cases=cases,
        make_inputs=partial(_sigmoid_inputs, scale=14.0),
        ours=sigmoid_contrastive,
        peers={"eager": _eager_sigmoid, "chunked": _chunked_sigmoid},
        backends=("cpu", "triton"),
        parity=cases.Shape(384, 384, 64),
        products=_products,
    ),
}
