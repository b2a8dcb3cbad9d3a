"""Peers of late interaction (MaxSim): queries are our captions, documents our images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..workloads.workload import Function
from .peer import Peer

HALVES = (torch.bfloat16, torch.float16)


def _transposed(scores: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """[B, C] from the `scores(queries, documents)` [C, B] of the retrieval libraries."""

    def max_sim(regions: Tensor, words: Tensor) -> Tensor:
        return scores(words, regions).T

    return max_sim


def _flash_maxsim() -> Function:
    from flash_maxsim import flash_maxsim_batched, flash_maxsim_batched_train

    def scores(queries: Tensor, documents: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad):
            return flash_maxsim_batched_train(queries, documents)
        return flash_maxsim_batched(queries, documents)

    return _transposed(scores)


def _flash_maxsim_invgrid() -> Function:
    from flash_maxsim.flash_maxsim_invgrid_proposal import flash_maxsim_invgrid_train

    def scores(queries: Tensor, documents: Tensor) -> Tensor:
        # It differentiates in float16 and hands the gradients back so, whatever came.
        return flash_maxsim_invgrid_train(queries.half(), documents.half())

    return _transposed(scores)


def _late_interaction_kernels(backward: str) -> Callable[[], Function]:
    def load() -> Function:
        from late_interaction_kernels import maxsim

        return _transposed(lambda queries, documents: maxsim(queries, documents, backward=backward))

    return load


def _pylate() -> Function:
    from pylate.scores import colbert_scores

    return _transposed(lambda queries, documents: colbert_scores(queries, documents, backend="torch"))


def _sentence_transformers() -> Function:
    from sentence_transformers.util import maxsim

    return _transposed(maxsim)


PEERS = {
    "max_sim": {
        "flash_maxsim": Peer(
            "flash-maxsim",
            _flash_maxsim,
            devices=("cuda",),
            dtypes=HALVES,
            why="float16 products; gradients of the regions by atomic sums, so not deterministic",
        ),
        "flash_maxsim_invgrid": Peer(
            "flash-maxsim",
            _flash_maxsim_invgrid,
            devices=("cuda",),
            dtypes=HALVES,
            passes=("forward+backward",),
            why="its backward without atomic sums; inputs and gradients in float16",
        ),
        "late_interaction_kernels": Peer(
            "late-interaction-kernels",
            _late_interaction_kernels("unified"),
            devices=("cuda",),
            dtypes=HALVES,
            why='backward="unified": atomic sums, so not deterministic',
        ),
        "late_interaction_kernels_lowmem": Peer(
            "late-interaction-kernels",
            _late_interaction_kernels("lowmem"),
            devices=("cuda",),
            dtypes=HALVES,
            why='backward="lowmem": half the memory, deterministic',
        ),
        "pylate": Peer(
            "pylate", _pylate, why="its own PyTorch: similarities [C, B, T, R] in the inputs' dtype"
        ),
        "sentence_transformers": Peer(
            "sentence-transformers",
            _sentence_transformers,
            why="PyTorch in chunks of 100 million elements",
        ),
    },
}
