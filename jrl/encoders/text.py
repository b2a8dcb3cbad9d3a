"""Text encoders: adapters around transformers text models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jrl.encoders.backbone import Backbone, build_backbone, config_to_dict
from jrl.encoders.image import backbone_width
from jrl.encoders.output import EncoderOutput
from jrl.encoders.pooling import eos_pool, last_pool, mean_pool

TEXT_POOLING = ("cls", "mean", "last", "eos", "pooler")


class TextEncoder(nn.Module):
    """Token ids to tokens and one vector, with any transformers text model.

    Args:
        model: a transformers model, its config, a dict with `model_type` (bert, clip_text_model, …), or the
            path of a local folder of saved weights, also a system's (RUN/model).
        pooling: "cls" (first token), "mean" (over real tokens), "last" (last real token), "eos" (first
            `eos_token_id`) or "pooler" (the model's own).
        eos_token_id: for "eos"; the model's config decides when it is None.
        allow_pickle: let `model` be a folder whose weights are pickled.

    Raises:
        TypeError, ValueError, OSError: see `build_backbone`; ValueError also for another `pooling`, and for
            "eos" without an id.
    """

    def __init__(
        self,
        model: Backbone,
        pooling: str = "mean",
        *,
        eos_token_id: int | None = None,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in TEXT_POOLING:
            raise ValueError(f"pooling: expected one of {', '.join(TEXT_POOLING)}, got {pooling!r}")
        if eos_token_id is not None and pooling != "eos":
            raise ValueError(f"eos_token_id: has a meaning only with pooling 'eos', got pooling {pooling!r}")
        self.pooling = pooling
        self.model = build_backbone(
            model, argument="text_encoder", with_pooler=pooling == "pooler", allow_pickle=allow_pickle
        )
        if pooling == "eos":
            eos_token_id = self.model.config.eos_token_id if eos_token_id is None else eos_token_id
            if not isinstance(eos_token_id, int):
                raise ValueError("eos_token_id: pooling 'eos' needs one, and the model's config has none")
        self.eos_token_id = eos_token_id
        self.width = backbone_width(self.model)

    @property
    def vocab_size(self) -> int | None:
        """Number of ids that the model embeds; None when its config does not say."""
        size = getattr(self.model.config, "vocab_size", None)
        return size if isinstance(size, int) else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        """Encode texts.

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, L] bool or integer, nonzero where a token is real; None when all are.

        Returns:
            global_ [B, width], tokens [B, L, width], mask [B, L] bool or None.

        Raises:
            TypeError: `input_ids` is not an integer tensor.
            ValueError: shapes do not fit, an id on a CPU is outside the vocabulary, or the model lacks what
                `pooling` asks for.
        """
        self._check(input_ids, attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()
        output = self.model(input_ids=input_ids, attention_mask=None if mask is None else mask.long())
        tokens = output.last_hidden_state
        if self.pooling == "pooler":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ValueError(f"pooling: {type(self.model).__name__} has no pooler; use 'mean'")
        elif self.pooling == "cls":
            pooled = tokens[:, 0]
        elif self.pooling == "last":
            pooled = last_pool(tokens, mask)
        elif self.pooling == "eos":
            assert self.eos_token_id is not None
            pooled = eos_pool(tokens, input_ids, self.eos_token_id)
        else:
            pooled = mean_pool(tokens, mask)
        return EncoderOutput(pooled, tokens, mask)

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this encoder again, without its weights, in JSON types."""
        values: dict[str, Any] = {"model": config_to_dict(self.model), "pooling": self.pooling}
        if self.pooling == "eos":
            values["eos_token_id"] = self.eos_token_id
        return values

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: expected int64, got {input_ids.dtype}")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: expected [B, L], got {list(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected {list(input_ids.shape)}, got {list(attention_mask.shape)}"
            )
        # reading values would stall an accelerator, where the embedding's own check reports instead
        if input_ids.device.type == "cpu" and input_ids.numel() and self.vocab_size is not None:
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"input_ids: expected ids in [0, {self.vocab_size}), got {low if low < 0 else high}; "
                    "does the tokenizer belong to this model?"
                )
