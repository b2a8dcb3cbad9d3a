"""Word-region attention between every image and every caption, and the same as people write it in PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import max_sim, word_region_scores
from jrl_kernels.ops.max_sim import cases as max_sim_cases
from jrl_kernels.ops.word_region import cases as word_region_cases

from ..measure import Step
from .workload import Workload


def _scores(regions: Tensor, words: Tensor) -> Tensor:
    """XMC-GAN's scores of B images with C captions: contexts [B, C, T, D] by batched products."""
    regions, words = F.normalize(regions.float(), dim=-1), F.normalize(words.float(), dim=-1)
    similarity = torch.einsum("brd,ctd->bctr", regions, words)
    attention = torch.softmax(5.0 * similarity, dim=-1)
    context = torch.einsum("bctr,brd->bctd", attention, regions)
    match = F.cosine_similarity(words[None], context, dim=-1, eps=1e-8)
    return torch.logsumexp(5.0 * match, dim=-1) / 5.0


def _loop(regions: Tensor, words: Tensor) -> Tensor:
    """Caption by caption, as the public implementations of AttnGAN and SCAN go."""
    return torch.cat([_scores(regions, caption) for caption in words.split(1)], dim=1)


def _max_sim(regions: Tensor, words: Tensor) -> Tensor:
    return torch.einsum("brd,ctd->bctr", regions, words).float().amax(-1).sum(-1)


def _products(arguments: dict[str, Any], backward: bool) -> Step:
    """Words with regions; backward once more and into both gradients. What follows from the match comes on top."""
    regions = arguments["regions"].detach().flatten(0, 1)
    words = arguments["words"].detach().flatten(0, 1)

    def step() -> None:
        similarity = words @ regions.T
        if backward:
            words @ regions.T
            similarity @ regions
            similarity.T @ words

    return step


WORKLOADS = {
    "word_region_scores": Workload(
        cases=word_region_cases,
        make_inputs=word_region_cases.make_inputs,
        ours=partial(word_region_scores, preset="xmc_gan", scale=1.0),
        peers={"eager": _scores, "loop": _loop},
        backends=("cpu", "triton"),
        parity=word_region_cases.SHAPES["ragged"],
        products=_products,
    ),
    "max_sim": Workload(
        cases=max_sim_cases,
        make_inputs=max_sim_cases.make_inputs,
        ours=max_sim,
        peers={"eager": _max_sim},
        backends=("cpu", "triton"),
        parity=max_sim_cases.SHAPES["ragged"],
        products=_products,
    ),
}
