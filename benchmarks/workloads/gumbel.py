"""Hard assignment and codebooks, and the same in PyTorch.

Without noise: eager PyTorch would have to draw the numbers of our generator to agree, which costs it far more than its own do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import gumbel_assign, gumbel_embed
from jrl_kernels.ops.gumbel import cases

from .workload import Workload


def _assign(queries: Tensor, keys: Tensor, values: Tensor, scale: Tensor, noise: bool) -> Tensor:
    """GroupViT's block: soft and one-hot maps [B, G, S], straight-through, mean of each group."""
    soft = (scale * (queries @ keys.mT).float()).softmax(1)
    hard = F.one_hot(soft.argmax(1), soft.shape[1]).mT.to(soft.dtype)
    assignment = hard + soft - soft.detach()
    count = assignment.sum(2, keepdim=True)
    share = torch.where(count > 0, assignment / count.clamp(min=0.5), 0.0)
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
        make_inputs=partial(cases.make_inputs, noise=False),
        ours=_pooled,
        peers={"eager": _assign},
        backends=("cpu", "triton"),
        parity=cases.SHAPES["ragged"],
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
