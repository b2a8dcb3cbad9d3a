"""The bounds as their papers write them: a dense matrix of scores of all locations. Works in float64, twice differentiable."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(u: Tensor) -> Tensor:
    """log(1 + exp(u)); PyTorch's own turns into u from 20 on, which float64 can tell from the truth."""
    return -F.logsigmoid(-u)


def mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the values that count; 0 where none does."""
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)


def log_sum_exp(values: Tensor, where: Tensor) -> Tensor:
    """Over the last axis, of the values that count; -inf, with no gradient, where none does."""
    some = where.any(-1)
    # A set without members is replaced before the sum, so that neither its value nor its gradient is NaN.
    filled = torch.where(some[..., None], values.masked_fill(~where, -math.inf), 0.0)
    return torch.where(some, filled.logsumexp(-1), -math.inf)


def nce(u: Tensor, own: Tensor, off: Tensor, own_logit: float | None) -> Tensor:
    """mean over own pairs (r, c) of log K_r - log(1 + exp(O_r - u_rc)), O_r the log-sum-exp of row r's other images."""
    candidates, counted = u, off
    if own_logit is not None:
        candidates, counted = u.masked_fill(own, own_logit), own | off
    rest = log_sum_exp(candidates, counted)
    ceiling = off.sum(1).to(u.dtype).log1p()
    # Only own pairs take part, so that the difference of two infinities elsewhere reaches no gradient.
    difference = torch.where(own, rest[:, None] - u, -math.inf)
    return mean(ceiling[:, None] - softplus(difference), own)


def jsd(u: Tensor, own: Tensor, off: Tensor) -> Tensor:
    """mean over own pairs of log 2 - softplus(-u), less the mean over the others of softplus(u) - log 2."""
    return mean(math.log(2) - softplus(-u), own) - mean(softplus(u) - math.log(2), off)


def dv(u: Tensor, own: Tensor, off: Tensor) -> Tensor:
    """mean over own pairs of u, less log of the mean over the others of exp(u)."""
    rest = log_sum_exp(u.flatten(), off.flatten()) - off.sum().clamp(min=1).to(u.dtype).log()
    return mean(u, own) - torch.where(off.any(), rest, 0.0)


def mutual_information(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    bound: str,
    direction: str,
    own_logit: float | None,
) -> Tensor:
    """A bound in nats from local features x [N, L, D] and y [N, M, D]; masks [N, L] and [N, M] are True for what counts."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        u = scale * (x.to(wide).flatten(0, 1) @ y.to(wide).flatten(0, 1).mT)
    images, device = x.shape[0], x.device
    x_image, y_image = (
        torch.arange(images, device=device).repeat_interleave(
            side.shape[1], output_size=images * side.shape[1]
        )
        for side in (x, y)
    )
    counts = torch.ones_like(u, dtype=torch.bool)
    if x_mask is not None:
        counts = counts & x_mask.flatten()[:, None]
    if y_mask is not None:
        counts = counts & y_mask.flatten()[None, :]
    same = x_image[:, None] == y_image[None, :]
    own, off = counts & same, counts & ~same
    if bound == "jsd":
        return jsd(u, own, off)
    if bound == "dv":
        return dv(u, own, off)
    found = []
    if direction != "y_to_x":
        found.append(nce(u, own, off, own_logit))
    if direction != "x_to_y":
        found.append(nce(u.mT, own.mT, off.mT, own_logit))
    return torch.stack(found).mean()
