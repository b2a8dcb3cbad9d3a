"""The contrastive loss of pictures that have several texts each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from jrl.objectives.contrastive import ContrastiveObjective, row_ids, several_ranks
from jrl_kernels import distributed, info_nce, info_nce_from_scores

DUPLICATES = ("negative", "exclude", "positive")

# A cosine this low has probability zero at any scale above 0.02, and unlike −∞ its product with a zero gradient is zero.
_NEVER = -1e4


class MultiLabelObjective(ContrastiveObjective):
    """InfoNCE of B pictures against N texts, several of which belong to one picture.

    With s_ij = scale · x_i·y_j, P_i the texts of picture i and o_j the picture of text j::

        I→T:  LSE_j s_ij − (1/|P_i|) Σ_{p∈P_i} s_ip      multi_positive="mean" (GroupViT's code: targets 1/K)
              LSE_j s_ij − LSE_{p∈P_i} s_ip              multi_positive="sum" (its patent, equation 7)
        T→I:  LSE_i s_ij − s_{o_j j}

    and the mean of the two directions (the patent adds them). Unlike theirs, texts that occur at several
    pictures need not count as negatives of each other. The logits are never stored, save by "exclude".
    Under torch.distributed with several ranks B and N are the pictures and texts of all, as in `ContrastiveObjective`.

    Args:
        duplicate_texts: what the copy of one of a picture's texts at another picture is to it: "negative" (as
            in code and patent), "exclude" (nothing; stores the [B, N] logits) or "positive" (its own).
        init_scale, max_scale, learnable, direction, multi_positive, backend, form: as in `ContrastiveObjective`.

    Raises:
        ValueError: a value outside those named, or form="ring" with duplicate_texts="exclude".
    """

    def __init__(
        self,
        duplicate_texts: str = "negative",
        *,
        init_scale: float | None = None,
        max_scale: float | None = 100.0,
        learnable: bool = True,
        direction: str = "both",
        multi_positive: str = "mean",
        backend: str = "auto",
        form: str = "gather",
    ) -> None:
        super().__init__(
            init_scale=init_scale,
            max_scale=max_scale,
            learnable=learnable,
            direction=direction,
            multi_positive=multi_positive,
            backend=backend,
            form=form,
        )
        if duplicate_texts not in DUPLICATES:
            raise ValueError(
                f"duplicate_texts: expected one of {', '.join(DUPLICATES)}, got {duplicate_texts!r}"
            )
        if duplicate_texts == "exclude" and form == "ring":
            raise ValueError(
                "form: duplicate_texts='exclude' stores all logits, so nothing goes round a ring"
            )
        self.duplicate_texts = duplicate_texts

    def forward(  # type: ignore[override]
        self, x: Tensor, y: Tensor, owners: Tensor, *, text_ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of pictures [B, D] against texts [N, D].

        Args:
            x: [B, D] pictures, of unit length for a cosine.
            y: [N, D] texts, likewise.
            owners: int64 [N] on the same device, the row of `x` that each text belongs to. A picture without a
                text contributes nothing.
            text_ids: int64 [N], equal where two texts are the same; needed unless `duplicate_texts` is "negative".

        Returns:
            The 0-d loss, and detached 0-d statistics as those of `ContrastiveObjective` ("exclude" has no bounds).

        Raises:
            TypeError, ValueError: as `jrl_kernels.info_nce`; ValueError also when shapes do not fit or
                `text_ids` is missing.
        """
        with distributed.raise_together(x, y):
            self._check_ids(owners, text_ids, len(y))
        if self.duplicate_texts == "exclude":
            everything = distributed.gather(y) if several_ranks() else y
            with distributed.raise_together(x, y):
                scores = _cosines(x, everything)
            return self.of_scores(scores, owners, text_ids=text_ids)
        own, owned = _named_apart(len(x), owners)
        positives: Any = (own, owned)
        if self.duplicate_texts == "positive":
            positives = _has_text(*_pairs(own, owned, text_ids)).to_sparse_csr()
        scale = self.scale
        softmax = self._across_ranks(distributed.info_nce, info_nce)
        loss, stats = softmax(x, y, scale=scale, positives=positives, **self._options())
        return loss, {"scale": scale.detach(), **self._named(stats)}

    def of_scores(
        self, scores: Tensor, owners: Tensor, *, text_ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same loss of scores [B, N] that a critic has made in place of x_i·y_j.

        Args:
            scores: [B, N] of B pictures with N texts; across ranks, of this rank's pictures with the texts of all.
            owners, text_ids: as in `forward`, of this rank's texts.

        Returns, Raises:
            as `forward`.
        """
        across_ranks = several_ranks()
        with distributed.raise_together(scores):
            self._check_ids(owners, text_ids, len(owners) if across_ranks else scores.shape[1])
        own, owned = _named_apart(len(scores), owners)
        positives: Any = (own, owned)
        if self.duplicate_texts != "negative":
            belongs, texts = _pairs(own, owned, text_ids)
            said = _has_text(belongs, texts)
            if self.duplicate_texts == "positive":
                positives = said.to_sparse_csr()
            else:
                with distributed.raise_together(scores):
                    scores = scores.masked_fill(said & ~belongs, _NEVER)
        scale = self.scale
        softmax = info_nce_from_scores
        if across_ranks:
            softmax = partial(distributed.info_nce_from_scores, columns=len(owners))
        loss, stats = softmax(scores, scale=scale, positives=positives, **self._options())
        named = self._named(stats)
        if self.duplicate_texts == "exclude":
            # the op takes the pairs that are left out for candidates, so its bound would be too high
            named = {name: value for name, value in named.items() if not name.startswith("bound")}
        return loss, {"scale": scale.detach(), **named}

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this objective again, in JSON types."""
        config = super().to_config()
        del config["loss"], config["init_bias"]
        return {"duplicate_texts": self.duplicate_texts, **config}

    def _options(self) -> dict[str, Any]:
        return {
            "direction": self.direction,
            "multi_positive": self.multi_positive,
            "return_stats": True,
            "backend": self.backend,
        }

    def _check_ids(self, owners: Tensor, text_ids: Tensor | None, texts: int) -> None:
        if text_ids is None and self.duplicate_texts != "negative":
            raise ValueError(f"text_ids: duplicate_texts={self.duplicate_texts!r} needs them, got None")
        for name, ids in (("owners", owners), ("text_ids", text_ids)):
            if ids is None:
                continue
            if ids.dtype != torch.int64:
                raise TypeError(f"{name}: expected int64, got {ids.dtype}")
            if ids.shape != (texts,):
                raise ValueError(f"{name}: expected [{texts}] as there are texts, got {list(ids.shape)}")


def _named_apart(pictures: int, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of this rank's pictures [B] and of its texts' owners [N], which no other rank has."""
    own = row_ids(pictures, owners.device, several_ranks())
    return own, owners + row_ids(1, owners.device, several_ranks())


def _pairs(own: Tensor, owners: Tensor, text_ids: Any) -> tuple[Tensor, Tensor]:
    """Which texts of all ranks belong to which of this rank's pictures, bool [B, N], and the ids of those texts [N]."""
    if several_ranks():
        owners, text_ids = distributed.gather(owners), distributed.gather(text_ids)
    return own[:, None] == owners, text_ids


def _has_text(belongs: Tensor, text_ids: Tensor) -> Tensor:
    """[B, N] bool: whether one of picture i's texts is the same as text j."""
    # the same texts share a number below N, so a scatter over the numbers serves where a product would need N² flags
    number = torch.searchsorted(text_ids.sort().values, text_ids)
    has = torch.zeros_like(belongs)
    rows, columns = torch.broadcast_tensors(torch.arange(len(has), device=has.device)[:, None], number)
    has = has.to(torch.int32).index_put((rows, columns), belongs.to(torch.int32), accumulate=True)
    return has[:, number] > 0


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) @ y.to(wide).T
