"""Peers of InfoNCE and of the sigmoid loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..workloads.workload import Function
from . import _source
from .peer import Peer

HALVES = (torch.bfloat16, torch.float16)
ONE_WAY = "one direction, called twice; scale multiplied into x, so that its gradient flows"
CACHED_ROWS = 1024
"""Rows of logits at a time: those of the chunked PyTorch beside it. sentence-transformers' own default is 32."""


def _refuse_unpaired(x: Tensor, y: Tensor) -> None:
    if x.shape[0] != y.shape[0]:
        raise NotImplementedError(f"takes as many rows of x as of y, got {x.shape[0]} and {y.shape[0]}")


def _both_ways(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    """The symmetric loss from a mean `cross_entropy(rows, classes, target)` of the logits rows @ classes.T."""

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        _refuse_unpaired(x, y)
        target = torch.arange(x.shape[0], device=x.device)
        scaled = (scale * x).to(x.dtype)
        return (cross_entropy(scaled, y, target) + cross_entropy(y, scaled, target)) / 2

    return loss


def _open_clip() -> Function:
    clip_loss = _source.module("open_clip", "loss.py").ClipLoss()

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        _refuse_unpaired(x, y)
        return clip_loss(x, y, scale)

    return loss


def _open_clip_sigmoid() -> Function:
    sigmoid_loss = _source.module("open_clip", "loss.py").SigLipLoss()

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        _refuse_unpaired(x, y)
        return sigmoid_loss(x, y, scale, bias)

    return loss


def _transformers() -> Function:
    from transformers.models.clip import modeling_clip

    # Under the second name before transformers 5.
    names = ("image_text_contrastive_loss", "clip_loss")
    symmetric = next(getattr(modeling_clip, name) for name in names if hasattr(modeling_clip, name))

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        _refuse_unpaired(x, y)
        return symmetric(y @ x.T * scale)

    return loss


def _inf_cl() -> Function:
    from inf_cl import cal_flash_loss

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        _refuse_unpaired(x, y)
        # Its kernels walk the width in heads of a power of two, and read whole tiles of 64 row gradients.
        head = min(256, x.shape[1] & -x.shape[1])
        if head < 16 or x.shape[0] % 64:
            raise NotImplementedError(
                f"inf_cl takes rows in multiples of 64 and widths in multiples of 16, got {tuple(x.shape)}"
            )
        target = torch.arange(x.shape[0], device=x.device)
        there = cal_flash_loss(x, y, target, scale=scale, head_dim=head).mean()
        return (there + cal_flash_loss(y, x, target, scale=scale, head_dim=head).mean()) / 2

    return loss


def _cut_cross_entropy(**options: Any) -> Callable[[], Function]:
    def load() -> Function:
        from cut_cross_entropy import linear_cross_entropy

        return _both_ways(
            lambda rows, classes, target: linear_cross_entropy(rows, classes, target, **options)
        )

    return load


def _liger() -> Function:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return _both_ways(lambda rows, classes, target: fused(classes, rows, target))


def _liger_sm90() -> Function:
    from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90 as sm90

    # Its check of the targets waits for the GPU.
    os.environ.setdefault(sm90.VALIDATE_TARGETS_ENV, "0")
    fused = sm90.LigerFusedScaledCrossEntropySM90Function
    return _both_ways(lambda rows, classes, target: fused.apply(rows, classes, target).mean())


def _torch_linear_cross_entropy() -> Function:
    try:
        fused, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    except AttributeError:
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy") from None
    return _both_ways(lambda rows, classes, target: fused(rows, classes, target, options=options))


def _quack() -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def cross_entropy(rows: Tensor, classes: Tensor, target: Tensor) -> Tensor:
        if rows.shape[0] % 8 or rows.shape[1] % 8:
            raise NotImplementedError(f"quack takes sizes in multiples of 8, got {tuple(rows.shape)}")
        return chunked_linear_cross_entropy(rows, classes, target)

    return _both_ways(cross_entropy)


def _ranking_options() -> dict[str, Any]:
    from sentence_transformers.util import dot_score

    return {
        "model": torch.nn.Sequential(torch.nn.Identity()),  # embeddings come in: never called
        "similarity_fct": dot_score,
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    }


def _sentence_transformers() -> Function:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    ranking = MultipleNegativesRankingLoss(**_ranking_options())

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        _refuse_unpaired(x, y)
        ranking.scale = scale  # a number by its signature; a tensor there gets its gradient
        return ranking.compute_loss_from_embeddings([x, y], None)

    return loss


class _GradCache(torch.autograd.Function):
    """The loss and its gradients a slice of rows at a time, as the library's trainer has them before its second forward."""

    @staticmethod
    def forward(ctx: Any, ranking: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        leaves = [given.detach().requires_grad_() for given in (x, y, scale)]
        with torch.enable_grad():
            ranking.scale = leaves[2]
            value = ranking.calculate_loss([[leaves[0]], [leaves[1]]], with_backward=True)
        ctx.save_for_backward(*(leaf.grad for leaf in leaves))
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *((upstream[0] * gradient).to(gradient.dtype) for gradient in ctx.saved_tensors)


def _sentence_transformers_cached() -> Function:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    ranking = CachedMultipleNegativesRankingLoss(**_ranking_options(), mini_batch_size=CACHED_ROWS)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        _refuse_unpaired(x, y)
        if torch.is_grad_enabled() and any(given.requires_grad for given in (x, y, scale)):
            return _GradCache.apply(ranking, x, y, scale)
        with torch.no_grad():
            ranking.scale = scale
            return ranking.calculate_loss([[x], [y]])

    return loss


def _pytorch_metric_learning() -> Function:
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.reducers import MeanReducer

    supervised = SupConLoss(
        temperature=1.0, distance=DotProductSimilarity(normalize_embeddings=False), reducer=MeanReducer()
    )

    def cross_entropy(rows: Tensor, classes: Tensor, target: Tensor) -> Tensor:
        # The same labels in the same place would mean the same embeddings, and pairs with itself left out.
        return supervised(rows, target, ref_emb=classes, ref_labels=target.clone())

    return _both_ways(cross_entropy)


PEERS = {
    "info_nce": {
        "open_clip": Peer("open_clip_torch", _open_clip, why="ClipLoss: two products, all logits in memory"),
        "transformers": Peer("transformers", _transformers, why="CLIP's loss over all logits in memory"),
        "sentence_transformers": Peer(
            "sentence-transformers",
            _sentence_transformers,
            why="MultipleNegativesRankingLoss, both directions; two products, all logits in memory",
        ),
        "sentence_transformers_cached": Peer(
            "sentence-transformers",
            _sentence_transformers_cached,
            why=f"CachedMultipleNegativesRankingLoss, {CACHED_ROWS} rows at a time, gradients within the forward",
        ),
        "pytorch_metric_learning": Peer(
            "pytorch-metric-learning",
            _pytorch_metric_learning,
            why=f"SupConLoss over indices of all pairs; {ONE_WAY}",
        ),
        "torch_linear_cross_entropy": Peer(
            "torch",
            _torch_linear_cross_entropy,
            why=f"chunked, gradients within the forward; {ONE_WAY}",
        ),
        "inf_cl": Peer(
            "inf-cl", _inf_cl, devices=("cuda",), why="float32 inside (TF32); one direction, called twice"
        ),
        "cut_cross_entropy": Peer(
            "cut-cross-entropy",
            _cut_cross_entropy(filter_eps=None),
            devices=("cuda",),
            dtypes=HALVES,
            why=f"no gradient filter; not deterministic; {ONE_WAY}",
        ),
        "cut_cross_entropy_filtered": Peer(
            "cut-cross-entropy",
            _cut_cross_entropy(),
            devices=("cuda",),
            dtypes=HALVES,
            why=f"its default: tiles of small gradients are dropped; not deterministic; {ONE_WAY}",
        ),
        "liger": Peer(
            "liger-kernel",
            _liger,
            devices=("cuda",),
            why=f"chunked, gradients within the forward, summed in the inputs' dtype; {ONE_WAY}",
        ),
        "liger_sm90": Peer(
            "liger-kernel",
            _liger_sm90,
            devices=("cuda",),
            capability=(9, 0),
            dtypes=(torch.bfloat16,),
            why=f"gradients of the classes summed in bfloat16; {ONE_WAY}",
        ),
        "quack": Peer(
            "quack-kernels",
            _quack,
            devices=("cuda",),
            dtypes=HALVES,
            why=f"chunked, gradients within the forward; {ONE_WAY}",
        ),
    },
    "sigmoid_contrastive": {
        "open_clip": Peer(
            "open_clip_torch", _open_clip_sigmoid, why="SigLipLoss: all logits and all labels in memory"
        ),
    },
}
