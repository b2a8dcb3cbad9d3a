"""Hard assignment and codebooks, and the same in PyTorch.

Without noise: eager PyTorch would have to draw the numbers of our generator to agree, which costs it far more than its own do.
Assignment with GroupViT's eps, since its published blocks divide 0 by 0 for an empty group without one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import gumbel_assign, gumbel_embed
from jrl_kernels.ops.gumbel import cases

from .workload import Workload

EPS = 1.0
"""assign_eps of GroupViT's published configurations."""


def _assign_inputs(shape: cases.Shape, **options: Any) -> dict[str, Any]:
    return {**cases.make_inputs(shape, noise=False, **options), "eps": EPS}


def _assign(queries: Tensor, keys: Tensor, values: Tensor, scale: Tensor, noise: bool, eps: float) -> Tensor:
    """GroupViT's block: soft and one-hot maps [B, G, S], straight-through, mean of each group."""
    soft = (scale * (queries @ keys.mT).float()).softmax(1)
    hard = F.one_hot(soft.argmax(1), soft.shape[1]).mT.to(soft.dtype)
    assignment = hard + soft - soft.detach()
    share = assignment / (assignment.sum(2, keepdim=True) + eps)
    return (share @ values.float()).to(values.dtype)


def _embed(logits: Tensor, codebook: Tensor, k: int, hard: bool, noise: bool) -> Tensor:
    """The k best codes, straight-through from the softmax."""
    soft = logits.float().softmax(-1)
    index = logits.topk(k, -1).indices
    one_hot = F.one_hot(index, logits.shape[-1]).to(soft.dtype)
    return (one_hot + (soft - soft.detach())[..., None, :]).to(codebook.dtype) @ codebook


def _pooled(**given: Any) -> Tensor:
    return gumbel_assign(**given).pooled


def _embedding(**given: Any) -> Tensor:
    return gumbel_embed(**given)[0]


class _EmbedCases:
    BENCHMARK_SHAPES = cases.EMBED_BENCHMARK_SHAPES
    flops = staticmethod(cases.flops)
    bytes_moved = staticmethod(cases.bytes_moved)


WORKLOADS = {
    "gumbel_assign": Workload(
        cases=cases,
        make_inputs=_assign_inputs,
        ours=_pooled,
        peers={"eager": _assign},
        backends=("cpu", "triton"),
        # None of its tokens is closer to a second group than bfloat16 tells apart: rounded logits choose as exact ones do.
        parity=cases.Shape(3, 11, 37, 24, 21),
    ),
    "gumbel_embed": Workload(
        cases=_EmbedCases,
        make_inputs=partial(cases.make_embed_inputs, noise=False),
        ours=_embedding,
        peers={"eager": _embed},
        backends=("cpu", "triton"),
        parity=cases.EMBED_SHAPES["ragged"],
    ),
}
