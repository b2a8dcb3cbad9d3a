"""Word-region attention, between every image and every caption and within a pair, and the same as people write it in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import max_sim, word_context, word_region_scores
from jrl_kernels.ops.max_sim import cases as max_sim_cases
from jrl_kernels.ops.word_context import cases as word_context_cases
from jrl_kernels.ops.word_region import cases as word_region_cases
from jrl_kernels.ops.word_region.cases import Shape

from ..measure import Step
from .workload import Workload


class _Paper(NamedTuple):
    """What one paper does to the similarities [B, C, T, R] and to the matches [B, C, T] of words with their contexts."""

    normalize: bool
    before: Callable[[Tensor], Tensor]
    attention_scale: float
    pool: Callable[[Tensor], Tensor]


def _unit_over_words(similarity: Tensor) -> Tensor:
    positive = F.leaky_relu(similarity, 0.1)
    return positive / (positive.norm(dim=2, keepdim=True) + 1e-8)


XMC_GAN = _Paper(True, lambda s: s, 5.0, lambda m: torch.logsumexp(5.0 * m, 2) / 5.0)
DAMSM = _Paper(False, lambda s: s.softmax(2), 4.0, lambda m: 10.0 * torch.logsumexp(5.0 * m, 2))
SCAN = _Paper(True, _unit_over_words, 9.0, lambda m: torch.logsumexp(6.0 * m, 2) / 6.0)


def _scores(regions: Tensor, words: Tensor, *, paper: _Paper) -> Tensor:
    """The scores of B images with C captions: contexts [B, C, T, D] by batched products."""
    regions, words = regions.float(), words.float()
    if paper.normalize:
        regions, words = F.normalize(regions, dim=-1), F.normalize(words, dim=-1)
    similarity = torch.einsum("brd,ctd->bctr", regions, words)
    attention = torch.softmax(paper.attention_scale * paper.before(similarity), dim=-1)
    context = torch.einsum("bctr,brd->bctd", attention, regions)
    return paper.pool(F.cosine_similarity(words[None], context, dim=-1, eps=1e-8))


def _loop(regions: Tensor, words: Tensor, *, paper: _Paper) -> Tensor:
    """Caption by caption, as the public implementations of AttnGAN and SCAN go."""
    return torch.cat([_scores(regions, caption, paper=paper) for caption in words.split(1)], dim=1)


def _cases(cpu: Shape, cuda: Shape) -> SimpleNamespace:
    """Those of word-region attention, at the one shape that a paper trains with."""
    return SimpleNamespace(
        BENCHMARK_SHAPES={"cpu": [cpu], "cuda": [cuda]},
        flops=word_region_cases.flops,
        bytes_moved=word_region_cases.bytes_moved,
    )


DAMSM_CASES = _cases(Shape(24, 24, 18, 289, 256), Shape(48, 48, 18, 289, 256))
"""The 17 x 17 regions of Inception's map and captions of 18 words, in batches of 48."""
SCAN_CASES = _cases(Shape(32, 32, 20, 36, 1024), Shape(128, 128, 50, 36, 1024))
"""36 detected regions, in batches of 128."""


def _max_sim(regions: Tensor, words: Tensor) -> Tensor:
    return torch.einsum("brd,ctd->bctr", regions, words).float().amax(-1).sum(-1)


def _context(regions: Tensor, words: Tensor, attention_scale: Tensor) -> Tensor:
    """XMC-GAN's attention of regions over the words of their own caption, contexts of unit words."""
    regions, words = F.normalize(regions, dim=-1), F.normalize(words, dim=-1)
    attention = (attention_scale * (regions @ words.mT).float()).softmax(-1)
    return attention.to(words.dtype) @ words


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


def _attention(cases: Any, paper: _Paper, **settings: Any) -> Workload:
    return Workload(
        cases=cases,
        make_inputs=word_region_cases.make_inputs,
        ours=partial(word_region_scores, **settings),
        peers={"eager": partial(_scores, paper=paper), "loop": partial(_loop, paper=paper)},
        backends=("cpu", "triton"),
        parity=word_region_cases.SHAPES["ragged"],
        products=_products,
    )


WORKLOADS = {
    "word_region_scores": _attention(word_region_cases, XMC_GAN, preset="xmc_gan", scale=1.0),
    "word_region_damsm": _attention(DAMSM_CASES, DAMSM, preset="damsm"),
    "word_region_scan": _attention(SCAN_CASES, SCAN, preset="scan_t2i"),
    "word_context": Workload(
        cases=word_context_cases,
        make_inputs=partial(word_context_cases.make_inputs, mask=False),
        ours=word_context,
        peers={"eager": _context},
        backends=("cpu", "cuda"),
        parity=word_context_cases.SHAPES["ragged"],
    ),
    "max_sim": Workload(
        cases=max_sim_cases,
        make_inputs=max_sim_cases.make_inputs,
        ours=max_sim,
        peers={"eager": _max_sim},
        backends=("cpu", "triton"),
        # None of its maxima is closer to the next than bfloat16 tells apart: rounded similarities choose as exact ones do.
        parity=max_sim_cases.Shape(3, 5, 13, 9, 21),
        products=_products,
    ),
}
