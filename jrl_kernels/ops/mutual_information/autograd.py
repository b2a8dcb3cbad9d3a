"""torch.ops.jrl.mutual_information_forward and its backward: schema, kernels' glue, fake implementation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import accumulation
from ..._operators import register
from ..._sweep import Source, Wanted, gradients
from .backends import BACKENDS
from .sweep import Counts, Images, Upstream, images_of, mean_over, own_softplus, own_sum


class _Problem(NamedTuple):
    """The operands of one call, prepared for a backend."""

    implementation: Any
    x: Tensor  # [N, L, D]
    y: Tensor  # [N, M, D]
    x_mask: Tensor | None
    y_mask: Tensor | None
    source: Source
    images: Images
    counts: Counts

    @classmethod
    def of(
        cls,
        backend: str,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        x_mask: Tensor | None,
        y_mask: Tensor | None,
    ) -> _Problem:
        implementation: Any = BACKENDS[backend].load()
        x, y = implementation.prepare(x), implementation.prepare(y)
        source = Source(x.flatten(0, 1), y.flatten(0, 1), None, scale)
        images = Images(images_of(x, x_mask), images_of(y, y_mask))
        return cls(implementation, x, y, x_mask, y_mask, source, images, Counts.of(x, y, x_mask, y_mask))


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, bound, direction, own_logit, backend = arguments
    problem = _Problem.of(backend, *inputs)
    source, images, counts = problem.source, problem.images, problem.counts
    like = source.scale  # in the accumulation dtype
    nothing = like.new_empty(0)
    if bound == "jsd":
        off = problem.implementation.softplus_sums(source, images).sum(dtype=torch.float64)
        own, _ = own_softplus(problem.x, problem.y, like, None, problem.x_mask, problem.y_mask)
        log_2 = math.log(2)
        value = mean_over(counts.own * log_2 - own, counts.own)
        value = value + mean_over(counts.off * log_2 - off, counts.off)
        return value.to(like.dtype), nothing, nothing.clone(), nothing.clone(), nothing.clone()
    if bound == "dv":
        rows, _ = problem.implementation.log_sum_exp(source, images, True, False)
        rest = rows.double().logsumexp(0)
        value = mean_over(own_sum(problem.x, problem.y, like), counts.own)
        value = value - torch.where(counts.off > 0, rest - counts.off.clamp(min=1).log(), 0.0)
        return value.to(like.dtype), rest.to(like.dtype)[None], nothing, nothing.clone(), nothing.clone()
    sides = direction != "y_to_x", direction != "x_to_y"
    found = problem.implementation.log_sum_exp(source, images, *sides)
    value = torch.zeros((), dtype=torch.float64, device=like.device)
    state = []
    views = (
        (problem.x, problem.y, problem.x_mask, problem.y_mask, counts),
        (problem.y, problem.x, problem.y_mask, problem.x_mask, counts.turned()),
    )
    for log_sum, (x, y, x_mask, y_mask, count) in zip(found, views, strict=True):
        if log_sum is None:
            state += [nothing.clone(), nothing.clone()]
            continue
        log_sum = count.with_own(log_sum, own_logit)
        loss, weights = own_softplus(x, y, like, log_sum, x_mask, y_mask)
        value = value + mean_over(count.ceiling() - loss, count.own)
        state += [log_sum, weights]
    return (value / sum(sides)).to(like.dtype), *state


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    *inputs, log_sum_x, weight_x, log_sum_y, weight_y, wanted, bound, direction, _, backend = arguments
    problem = _Problem.of(backend, *inputs)
    source, counts = problem.source, problem.counts
    sides = direction != "y_to_x", direction != "x_to_y"
    share = grad / sum(sides) if bound == "nce" else grad
    own = mean_over(share.double(), counts.own).to(grad.dtype)
    off = -mean_over(grad.double(), counts.off).to(grad.dtype)
    rows = source.shape[0]
    if bound == "jsd":
        upstream = Upstream(bound, own, off)
    elif bound == "dv":
        upstream = Upstream(
            bound, own, off, log_sum_x.expand(rows).contiguous(), -grad.expand(rows).contiguous()
        )
    else:
        x = (log_sum_x, -own * weight_x) if sides[0] else (None, None)
        y = (log_sum_y, -own * weight_y) if sides[1] else (None, None)
        upstream = Upstream(bound, own, off, *x, *y)
    tile, block = problem.implementation.gradient(source, problem.images, upstream)
    found = gradients(source, tile, block, Wanted(wanted[0], wanted[1], False, wanted[2]), bias=False)
    return (
        None if found.x is None else found.x.view(problem.x.shape),
        None if found.y is None else found.y.view(problem.y.shape),
        found.scale,
    )


def _forward_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    bound, direction = rest[3], rest[4]
    like = x.new_empty(0, dtype=accumulation(x.dtype))
    rows, columns = x.shape[0] * x.shape[1], y.shape[0] * y.shape[1]
    x_state = y_state = (0, 0)
    if bound == "dv":
        x_state = (1, 0)
    elif bound == "nce":
        x_state = (rows, rows) if direction != "y_to_x" else (0, 0)
        y_state = (columns, columns) if direction != "x_to_y" else (0, 0)
    return like.new_empty(()), *(like.new_empty(length) for length in (*x_state, *y_state))


register(
    "mutual_information",
    inputs="Tensor x, Tensor y, Tensor scale, Tensor? x_mask, Tensor? y_mask",
    options="str bound, str direction, float? own_logit, str backend",
    outputs=("value", "log_sum_x", "weight_x", "log_sum_y", "weight_y"),
    gradients=("x", "y", "scale"),
    forward=_forward,
    fake=_forward_fake,
    backward=_backward,
)
