"""Look-alikes of open_clip's losses: `ClipLoss`, `SigLipLoss`, `CoCaLoss`. open_clip itself is not imported.

    from jrl_kernels.integrations.open_clip import ClipLoss     # was: from open_clip import ClipLoss

Constructors, call forms and results are those of open_clip 3 and of its main branch (which has no `use_horovod`); the loss goes
to open_clip's training loop, or to a task as `CLIPTask(model, loss=ClipLoss())`. The logits [B, B] are never made.

With `world_size > 1` the loss is that of the batches of all ranks, and after DDP's average the gradients of every parameter are
those of one process with the whole batch, whatever `local_loss` and `gather_with_grad` say (docs/integrations.md has the table of
what they mean in open_clip).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import distributed, info_nce, sigmoid_contrastive
from ._softmax import same_rows

__all__ = ["ClipLoss", "CoCaLoss", "SigLipLoss"]


class ClipLoss(nn.Module):
    """CLIP's loss over the image and text features of a batch, or of the batches of all ranks.

        loss = ½ (CE over rows + CE over columns) of logit_scale I Tᵀ

    Radford et al. 2021, as open_clip's `ClipLoss` computes it.

    Args:
        local_loss: accepted. A rank computes its own rows of the logits either way; the value is the loss of the whole batch,
            the mean over the ranks of what open_clip returns with True.
        gather_with_grad: accepted. Gradients always pass through the gathered features.
        cache_labels: accepted; there are no labels to keep.
        rank, world_size: this rank and the number of ranks, those of torch.distributed's default group.
        use_horovod: open_clip 3's; True is not supported across ranks.

    Raises:
        NotImplementedError: use_horovod with several ranks.
        RuntimeError: several ranks, and torch.distributed is not initialised (at the first call).
        ValueError: rank and world_size are not those of torch.distributed (at the first call); different numbers of features.

    Gradients: image_features, text_features, logit_scale (logit_bias: zero).
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod and world_size > 1:
            raise NotImplementedError("ClipLoss: Horovod is not supported; use torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss of features [B, D] of unit rows: a 0-d tensor, or with output_dict {"contrastive_loss": it}."""
        options: dict[str, Any] = {"scale": logit_scale, "bias": logit_bias}
        if self.world_size > 1:
            _check_ranks("ClipLoss", self.rank, self.world_size)
            loss = distributed.info_nce(image_features, text_features, **options)
        else:
            same_rows("ClipLoss", "image_features", image_features, "text_features", text_features)
            loss = info_nce(image_features, text_features, **options)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """The sigmoid loss over the image and text features of a batch, or of the batches of all ranks.

        loss = -(1/B) sum_ij log sigmoid(z_ij (logit_scale x_i . y_j + logit_bias)),  z_ij = 1 for i = j, else -1

    Zhai et al. 2023. On every rank the value is the loss of the whole batch: the mean over the ranks of what open_clip returns.

    Args:
        cache_labels: accepted; there are no labels.
        rank, world_size: as in `ClipLoss`.
        dist_impl: open_clip's ways to exchange texts, "bidir", "shift", "reduce" or "gather"; accepted, the result is the same.

    Raises: ValueError for another dist_impl; else as `ClipLoss`.

    Gradients: image_features, text_features, logit_scale, logit_bias.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"SigLipLoss: dist_impl must be bidir, shift, reduce, gather or None, got {dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss of features [B, D]: a 0-d tensor, or with output_dict {"contrastive_loss": it}."""
        options: dict[str, Any] = {"scale": logit_scale, "bias": 0.0 if logit_bias is None else logit_bias}
        if self.world_size > 1:
            _check_ranks("SigLipLoss", self.rank, self.world_size)
            loss = distributed.sigmoid_contrastive(image_features, text_features, **options)
        else:
            same_rows("SigLipLoss", "image_features", image_features, "text_features", text_features)
            loss = sigmoid_contrastive(image_features, text_features, **options)
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(ClipLoss):
    """CoCa's two losses: CLIP's, and the cross-entropy of the captioner's words.

    Yu et al. 2022, as open_clip's `CoCaLoss`. Only the contrastive one is fused; the captioning loss is PyTorch's cross-entropy
    over this rank's logits [B, T, V].

    Args:
        caption_loss_weight, clip_loss_weight: factors of the two; with clip_loss_weight 0 the first is not computed.
        pad_id: the label that counts for nothing.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in `ClipLoss`.

    Gradients: image_features, text_features, logits, logit_scale.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.caption_loss_weight = caption_loss_weight
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> Any:
        """(contrastive, caption) losses, or with output_dict {"contrastive_loss": ..., "caption_loss": ...}.

        logits [B, T, V] predict labels [B, T].
        """
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        else:
            contrastive = torch.tensor(0, device=logits.device)
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


def _check_ranks(name: str, rank: int, world_size: int) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{name}: world_size is {world_size}, but torch.distributed is not initialised")
    found = dist.get_rank(), dist.get_world_size()
    if found != (rank, world_size):
        raise ValueError(
            f"{name}: rank and world_size must be torch.distributed's, {found[0]} and {found[1]}, "
            f"got {rank} and {world_size}"
        )
