"""The contrastive loss of texts that look for their segments in every picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jrl.objectives.contrastive import several_ranks
from jrl.objectives.multi_label import MultiLabelObjective
from jrl_kernels import attention_critic, distributed


class SegmentTextObjective(MultiLabelObjective):
    """Multi-label contrastive loss in which a text attends to the segments of a picture.

        α_ijg = softmax_g(attention_scale z_ig·t_j),   s_ij = Σ_g α_ijg z_ig·t_j

    and s_ij takes the place of x_i·y_j in `MultiLabelObjective`. A phrase has to fit one segment of its picture
    better than it fits any segment of other pictures, so that single segments, and not their mean alone, come to
    lie near their words. Not in GroupViT's paper; the score is the attention critic of US 2021/0056353 A1
    (equation 3) with segments as locations, and no projections of its own.

    Args:
        attention_scale: factor of the attention's logits; 0 averages the segments, ∞ would take the nearest.
        duplicate_texts, init_scale, max_scale, learnable, direction, multi_positive, backend: as in
            `MultiLabelObjective`.
        form: "gather", for every rank scores the texts of all.

    Raises:
        ValueError: a value outside those named.
    """

    def __init__(
        self,
        attention_scale: float = 10.0,
        *,
        duplicate_texts: str = "negative",
        init_scale: float | None = None,
        max_scale: float | None = 100.0,
        learnable: bool = True,
        direction: str = "both",
        multi_positive: str = "mean",
        backend: str = "auto",
        form: str = "gather",
    ) -> None:
        super().__init__(
            duplicate_texts,
            init_scale=init_scale,
            max_scale=max_scale,
            learnable=learnable,
            direction=direction,
            multi_positive=multi_positive,
            backend=backend,
            form=form,
        )
        if form == "ring":
            raise ValueError("form: every rank scores the texts of all, so nothing goes round a ring")
        if not attention_scale >= 0:
            raise ValueError(f"attention_scale: expected 0 or more, got {attention_scale}")
        self.attention_scale = attention_scale

    def forward(  # type: ignore[override]
        self,
        segments: Tensor,
        texts: Tensor,
        owners: Tensor,
        *,
        text_ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of pictures with segments [B, G, D] against texts [N, D].

        Args:
            segments: [B, G, D], of unit length for a cosine.
            texts: [N, D], likewise.
            owners, text_ids: as in `MultiLabelObjective`.

        Returns, Raises:
            as `MultiLabelObjective`, and as `jrl_kernels.attention_critic`.
        """
        with distributed.raise_together(texts):
            self._check_ids(owners, text_ids, len(texts))
        if several_ranks():
            texts = distributed.gather(texts)
        words = texts[:, None]  # each text is a caption of one word
        with distributed.raise_together(texts):
            scores = attention_critic(
                segments, segments, words, words, scale=self.attention_scale, backend=self.backend
            )
        return self.of_scores(scores, owners, text_ids=text_ids)

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this objective again, in JSON types."""
        return {"attention_scale": self.attention_scale, **super().to_config()}
