"""Word-region attention as its papers write it, every map and context in memory. Works in float64, twice differentiable."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def prenormalized(dots: Tensor, query_mask: Tensor | None, how: str) -> Tensor:
    """`dots` [B, C, T, R] normalised over the valid queries of each caption, for each key; 0 for the others."""
    if query_mask is None:
        valid = torch.ones((), dtype=torch.bool, device=dots.device)
    else:
        valid = query_mask[:, :, None]
    if how == "softmax":
        # A caption without a valid query is replaced before the softmax, so that its gradient is not NaN.
        some = valid if query_mask is None else query_mask.any(1)[:, None, None]
        logits = torch.where(some, dots.masked_fill(~valid, -math.inf), 0.0)
        return torch.where(valid, torch.softmax(logits, 2), 0.0)
    if how.startswith("leakyrelu"):
        dots = F.leaky_relu(dots, 0.1)
    dots = torch.where(valid, dots, 0.0)
    if how.endswith("l2norm"):
        return dots / (torch.linalg.vector_norm(dots, dim=2, keepdim=True) + EPS)
    if how.endswith("l1norm"):
        return dots / (dots.abs().sum(2, keepdim=True) + EPS)
    return dots


def attention(logits: Tensor, key_mask: Tensor | None, hard: bool) -> Tensor:
    """Over the keys of `logits` [B, C, T, R]: softmax, or one at the largest (lowest index among ties). 0 without valid keys."""
    if key_mask is not None:
        valid = key_mask[:, None, None]
        some = key_mask.any(1)[:, None, None, None]
        logits = torch.where(some, logits.masked_fill(~valid, -math.inf), 0.0)
    if hard:
        alpha = F.one_hot(logits.argmax(3), logits.shape[3]).to(logits.dtype)
        alpha = torch.where(logits.isnan().any(3, keepdim=True), math.nan, alpha)
    else:
        alpha = torch.softmax(logits, 3)
    return alpha if key_mask is None else torch.where(valid & some, alpha, 0.0)


def match(
    keys: Tensor,
    queries: Tensor,
    key_values: Tensor | None,
    query_values: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attention_scale: Tensor,
    prenormalize: str,
    hard: bool,
    cosine: bool,
) -> Tensor:
    """How each query's context agrees with it, [B, C, T]: a dot product, or a cosine; 0 where either side is not valid."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    with torch.autocast(keys.device.type, enabled=False):
        k, q = keys.to(wide), queries.to(wide)
        v = k if key_values is None else key_values.to(wide)
        w = q if query_values is None else query_values.to(wide)
        dots = torch.einsum("ctd,brd->bctr", q, k)
        logits = attention_scale * prenormalized(dots, query_mask, prenormalize)
        alpha = attention(logits, key_mask, hard)
        contexts = torch.einsum("bctr,bre->bcte", alpha, v)
        result = (contexts * w).sum(3)
        if cosine:
            context_norm, norm = (torch.linalg.vector_norm(t, dim=-1) for t in (contexts, w))
            result = result / (context_norm.clamp(min=EPS) * norm.clamp(min=EPS))
            # One that is too short to have a direction: no number, rather than a gradient of 1 / EPS.
            result = torch.where(norm <= EPS, 0.0, result)
    valid = torch.ones(result.shape[0], 1, 1, dtype=torch.bool, device=result.device)
    if key_mask is not None:
        valid = key_mask.any(1)[:, None, None]
    if query_mask is not None:
        valid = valid & query_mask
    return torch.where(valid, result, 0.0)
