"""CLIP: two encoders, two projections, one temperature."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from jrl.encoders import EncoderOutput, ImageEncoder, ProjectionHead, TextEncoder
from jrl.objectives import ContrastiveObjective, duplicate_text_ids
from jrl.systems.zero_shot import ZeroShotSystem

DUPLICATES = ("negative", "exclude", "positive")


class CLIP(ZeroShotSystem):
    """Contrastive language-image pre-training.

        I_e = l2(image_encoder(I) W_i),  T_e = l2(text_encoder(T) W_t)
        loss = ½ (CE over rows + CE over columns) of exp(t) I_e T_eᵀ with the diagonal as targets

    Radford et al. 2021. Under data parallelism the negatives of a pair are the other pairs of all ranks.

    Args:
        image_encoder: pictures to vectors.
        text_encoder: texts to vectors.
        projection_dim: D, width of the joint space.
        projection: kind of both heads: "linear", "mlp" or "mlp_bn".
        projection_hidden: width inside an MLP head; the encoder's when None.
        objective: the loss; CLIP's when None.
        duplicate_captions: what two rows with the same caption are to each other: "negative" (as in the
            paper), "exclude" (nothing) or "positive".

    Raises:
        TypeError: an encoder or the objective is of another type.
        ValueError: another `projection` or `duplicate_captions`, a `projection_dim` below 1.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        projection_dim: int = 512,
        projection: str = "linear",
        projection_hidden: int | None = None,
        objective: ContrastiveObjective | None = None,
        duplicate_captions: str = "negative",
    ) -> None:
        super().__init__()
        objective = ContrastiveObjective() if objective is None else objective
        for name, value, kind in (
            ("image_encoder", image_encoder, ImageEncoder),
            ("text_encoder", text_encoder, TextEncoder),
            ("objective", objective, ContrastiveObjective),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
        if duplicate_captions not in DUPLICATES:
            raise ValueError(
                f"duplicate_captions: expected one of {', '.join(DUPLICATES)}, got {duplicate_captions!r}"
            )
        if duplicate_captions == "exclude" and objective.loss == "sigmoid":
            raise ValueError(
                "duplicate_captions: the sigmoid loss cannot exclude pairs; use 'positive' or 'negative'"
            )
        self.image_encoder, self.text_encoder, self.objective = image_encoder, text_encoder, objective
        self.projection_dim, self.duplicate_captions = projection_dim, duplicate_captions
        options: dict[str, Any] = {"kind": projection, "hidden_features": projection_hidden}
        self.image_projection = ProjectionHead(image_encoder.width, projection_dim, **options)
        self.text_projection = ProjectionHead(text_encoder.width, projection_dim, **options)

    @property
    def image_trunk(self) -> nn.Module:
        """The image encoder, without its projection."""
        return self.image_encoder

    def encode_image(self, pixel_values: Tensor) -> EncoderOutput:
        """Pictures [B, 3, H, W] to unit vectors [B, D], with the trunk's tokens [B, L, W]."""
        output = self.image_encoder(pixel_values)
        return EncoderOutput(F.normalize(self.image_projection(output.global_), dim=-1), output.tokens)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        """Texts [C, L] to unit vectors [C, D], with the trunk's tokens [C, L, W] and mask [C, L]."""
        output = self.text_encoder(input_ids, attention_mask)
        return EncoderOutput(
            F.normalize(self.text_projection(output.global_), dim=-1), output.tokens, output.mask
        )

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The contrastive loss of a batch.

        Args:
            batch: `pixel_values` [B, 3, H, W]; `input_ids` and `attention_mask` [C, L]; optionally
                `positives`, `negatives`, `exclude` and `weights` as `ContrastiveObjective` takes them.

        Returns:
            {"contrastive": 0-d loss}, and the objective's statistics.

        Raises:
            KeyError: `pixel_values` or `input_ids` is missing.
            ValueError: B ≠ C without `positives`, or `positives` beside `duplicate_captions="positive"`.
        """
        input_ids, attention_mask = batch["input_ids"], batch.get("attention_mask")
        options: dict[str, Any] = {
            name: batch[name] for name in ("positives", "negatives", "exclude", "weights") if name in batch
        }
        if self.duplicate_captions != "negative":
            role = "exclude" if self.duplicate_captions == "exclude" else "positives"
            if role in options:
                raise ValueError(
                    f"batch: has {role!r}, which duplicate_captions={self.duplicate_captions!r} also sets"
                )
            ids = duplicate_text_ids(input_ids, attention_mask)
            options[role] = (ids, ids)
        image = self.encode_image(batch["pixel_values"]).global_
        text = self.encode_text(input_ids, attention_mask).global_
        loss, stats = self.objective(image, text, **options)
        return {"contrastive": loss}, stats

    def to_config(self) -> dict[str, Any]:
        """Arguments of `from_config`, in JSON types."""
        head = self.image_projection.to_config()
        return {
            "image_encoder": self.image_encoder.to_config(),
            "text_encoder": self.text_encoder.to_config(),
            "projection_dim": self.projection_dim,
            "projection": head["kind"],
            "projection_hidden": head["hidden_features"],
            "objective": self.objective.to_config(),
            "duplicate_captions": self.duplicate_captions,
        }

    @classmethod
    def _assemble(cls, config: dict[str, Any]) -> CLIP:
        image_encoder = ImageEncoder(**config.pop("image_encoder"))
        text_encoder = TextEncoder(**config.pop("text_encoder"))
        objective = ContrastiveObjective(**config.pop("objective"))
        return cls(image_encoder, text_encoder, objective=objective, **config)
