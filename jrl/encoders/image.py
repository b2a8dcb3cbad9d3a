"""Image encoders: adapters around transformers vision models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from jrl.encoders.backbone import Backbone, build_backbone, config_to_dict
from jrl.encoders.output import EncoderOutput
from jrl.encoders.pooling import mean_pool

IMAGE_POOLING = ("cls", "mean", "pooler", "logits")


class ImageEncoder(nn.Module):
    """Pictures to tokens and one vector, with any transformers vision model.

    Args:
        model: a transformers model, its config, a dict with `model_type` (vit, resnet, convnext,
            clip_vision_model, …), or the path of a local folder of saved weights, also a system's (RUN/model).
        pooling: "cls" (the first token), "mean" (over all tokens), "pooler" (the model's own), or "logits": those of an image
            classifier, as which `model` is then built or read.
        allow_pickle: let `model` be a folder whose weights are pickled.

    Raises:
        TypeError, ValueError, OSError: see `build_backbone`; ValueError also for another `pooling`.
    """

    def __init__(self, model: Backbone, pooling: str = "mean", *, allow_pickle: bool = False) -> None:
        super().__init__()
        if pooling not in IMAGE_POOLING:
            raise ValueError(f"pooling: expected one of {', '.join(IMAGE_POOLING)}, got {pooling!r}")
        self.pooling = pooling
        self.model = build_backbone(
            model,
            argument="image_encoder",
            with_pooler=pooling == "pooler",
            classifier=pooling == "logits",
            allow_pickle=allow_pickle,
        )
        self.width = (
            len(self.model.config.id2label or ()) if pooling == "logits" else backbone_width(self.model)
        )

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode pictures.

        Args:
            pixel_values: [B, 3, H, W] float, normalised as the model expects.

        Returns:
            global_ [B, width], tokens [B, L, width] (a feature map [B, C, h, w] becomes [B, h·w, C]; logits are one token).

        Raises:
            TypeError: `pixel_values` is not floating point.
            ValueError: `pixel_values` is not [B, C, H, W], or the model lacks what `pooling` asks for.
        """
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values: expected a floating dtype, got {pixel_values.dtype}")
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values: expected [B, C, H, W], got {list(pixel_values.shape)}")
        output = self.model(pixel_values=pixel_values)
        wanted = "logits" if self.pooling == "logits" else "last_hidden_state"
        hidden = getattr(output, wanted, None)
        if hidden is None:
            name = type(self.model).__name__
            raise ValueError(f"pooling: {name} has no {wanted}, which {self.pooling!r} needs")
        if self.pooling == "logits":
            return EncoderOutput(hidden, hidden[:, None])
        is_map = hidden.ndim == 4
        tokens = hidden.flatten(2).transpose(1, 2) if is_map else hidden
        if self.pooling == "pooler":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ValueError(f"pooling: {type(self.model).__name__} has no pooler; use 'cls' or 'mean'")
            return EncoderOutput(pooled.flatten(1), tokens)
        if self.pooling == "cls":
            if is_map:
                raise ValueError(f"pooling: {type(self.model).__name__} has no class token; use 'mean'")
            return EncoderOutput(tokens[:, 0], tokens)
        return EncoderOutput(mean_pool(tokens, None), tokens)

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this encoder again, without its weights, in JSON types."""
        return {"model": config_to_dict(self.model), "pooling": self.pooling}


def backbone_width(model: nn.Module) -> int:
    """Width of the token features of a transformers model.

    Raises:
        ValueError: the config says neither `hidden_size` nor `hidden_sizes`.
    """
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if width is None and getattr(config, "hidden_sizes", None):
        width = config.hidden_sizes[-1]
    if not isinstance(width, int):
        raise ValueError(
            f"model: the config of {type(model).__name__} says neither hidden_size nor hidden_sizes"
        )
    return width
