"""CLIP: two encoders, two projections, one temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.encoders import EncoderOutput, ImageEncoder, ProjectionHead, TextEncoder
from jrl.objectives import ContrastiveObjective, duplicate_text_ids
from jrl.systems.base import System

DUPLICATES = ("negative", "exclude", "positive")


class CLIP(System):
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

    @torch.no_grad()
    def zero_shot_classifier(
        self, class_names: Sequence[str], templates: Sequence[str], tokenizer: Callable[..., Any]
    ) -> Tensor:
        """One unit vector a class: l2 of the mean over the templates of l2(text).

        Args:
            class_names: names of the classes.
            templates: prompts with "{}" where the name goes, such as "a photo of a {}".
            tokenizer: a transformers tokenizer.

        Returns:
            [classes, D].

        Raises:
            ValueError: no class, no template, or a template without "{}".
        """
        if not class_names:
            raise ValueError("class_names: expected at least one name")
        if not templates:
            raise ValueError("templates: expected at least one template")
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"templates: expected '{{}}' where the name goes, got {template!r}")
        device = self.text_projection.output.weight.device
        was_training = self.training
        self.eval()
        try:
            vectors = []
            for name in class_names:
                prompts = [template.replace("{}", name) for template in templates]
                tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
                encoded = self.encode_text(
                    tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
                )
                vectors.append(F.normalize(encoded.global_.mean(dim=0), dim=-1))
        finally:
            self.train(was_training)
        return torch.stack(vectors)

    @torch.no_grad()
    def classify(self, pixel_values: Tensor, classifier: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k likeliest classes of each picture.

        Args:
            pixel_values: [B, 3, H, W].
            classifier: [classes, D] from `zero_shot_classifier`.
            k: how many classes; at most the number there is.

        Returns:
            Probabilities [B, k] at the learned temperature, and class indices int64 [B, k], best first.

        Raises:
            ValueError: `classifier` is not [classes, D], or `k` is outside [1, classes].
        """
        if classifier.ndim != 2 or classifier.shape[1] != self.projection_dim:
            raise ValueError(
                f"classifier: expected [classes, {self.projection_dim}], got {list(classifier.shape)}"
            )
        if not 1 <= k <= classifier.shape[0]:
            raise ValueError(f"k: expected between 1 and {classifier.shape[0]} classes, got {k}")
        was_training = self.training
        self.eval()
        try:
            image = self.encode_image(pixel_values).global_
        finally:
            self.train(was_training)
        probabilities = (self.objective.scale * image @ classifier.T).softmax(dim=-1)
        best = probabilities.topk(k, dim=-1)
        return best.values, best.indices

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
    def from_config(cls, config: dict[str, Any]) -> CLIP:
        """Build the system that `to_config` describes, with fresh weights.

        Raises:
            ValueError: a part is missing or does not fit.
        """
        config = dict(config)
        try:
            image_encoder = ImageEncoder(**config.pop("image_encoder"))
            text_encoder = TextEncoder(**config.pop("text_encoder"))
            objective = ContrastiveObjective(**config.pop("objective"))
            return cls(image_encoder, text_encoder, objective=objective, **config)
        except KeyError as error:
            raise ValueError(f"config: has no {error.args[0]!r}") from error
        except TypeError as error:
            raise ValueError(f"config: {error}") from error
