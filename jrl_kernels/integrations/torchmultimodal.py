"""A look-alike of torchmultimodal's `ContrastiveLossWithTemperature`. torchmultimodal itself is not imported.

from jrl_kernels.integrations.torchmultimodal import ContrastiveLossWithTemperature
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import distributed, info_nce
from ._softmax import same_rows

__all__ = ["BackpropType", "ContrastiveLossWithTemperature"]

OP = "ContrastiveLossWithTemperature"
LOG_OF_ONE, LOG_OF_ONE_HUNDRED = 0.0, math.log(100)
LOG_OF_THE_FIRST_SCALE = math.log(1 / 0.07)


class BackpropType(Enum):
    """Where the gradients of gathered embeddings go; torchmultimodal's own enumeration is taken too."""

    GLOBAL = 0
    LOCAL = 1
    NONE = 2


class ContrastiveLossWithTemperature(nn.Module):
    """CLIP's loss with a learned scale that is clamped before each step.

        loss = ½ (CE over rows + CE over columns) of exp(clamp(logit_scale)) A Bᵀ

    Radford et al. 2021; Singh et al. 2022 (FLAVA). The parameter itself is clamped in the forward, as there, so that its
    gradient is not cut off. The embeddings are used as they are: normalise them for cosines.

    Args:
        logit_scale: log of the initial scale, or an nn.Parameter to use.
        logit_scale_min, logit_scale_max: bounds of the log; None for no bound, not both.

    Raises:
        ValueError: both bounds None.

    Gradients: embeddings_a, embeddings_b, logit_scale.
    """

    def __init__(
        self,
        logit_scale: float | nn.Parameter = LOG_OF_THE_FIRST_SCALE,
        logit_scale_min: float | None = LOG_OF_ONE,
        logit_scale_max: float | None = LOG_OF_ONE_HUNDRED,
    ) -> None:
        super().__init__()
        if logit_scale_min is None and logit_scale_max is None:
            raise ValueError(
                "ContrastiveLossWithTemperature: logit_scale_min and logit_scale_max cannot both be None"
            )
        self.logit_scale_min = logit_scale_min
        self.logit_scale_max = logit_scale_max
        if isinstance(logit_scale, nn.Parameter):
            self.logit_scale = logit_scale
        else:
            self.logit_scale = nn.Parameter(logit_scale * torch.ones([]))

    def forward(
        self,
        embeddings_a: Tensor,
        embeddings_b: Tensor,
        backprop_type: Any = BackpropType.GLOBAL,
        cross_entropy_kwargs: dict[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings [B, D], a 0-d tensor.

        Args:
            embeddings_a, embeddings_b: [B, D] of this rank; where torch.distributed runs, the loss is of all ranks' batches.
            backprop_type: GLOBAL; of several ranks nothing else is computed.
            cross_entropy_kwargs: not supported.
            mask: bool [B], True for pairs whose losses count; the others stay candidates. Of no pair the loss is 0 (NaN there).

        Raises:
            NotImplementedError: LOCAL or NONE across ranks; cross_entropy_kwargs.
            TypeError: a mask that is not boolean, for numbers would be indices in torchmultimodal.
            ValueError: different numbers of rows.
        """
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        with distributed.raise_together(embeddings_a, embeddings_b):
            same_rows(OP, "embeddings_a", embeddings_a, "embeddings_b", embeddings_b)
            if cross_entropy_kwargs:
                raise NotImplementedError(
                    f"{OP}: cross_entropy_kwargs are not supported, got {sorted(cross_entropy_kwargs)}"
                )
            if mask is not None and mask.dtype != torch.bool:
                raise TypeError(f"{OP}: mask must be boolean, True for pairs that count, got {mask.dtype}")
            if ranks > 1 and getattr(backprop_type, "name", backprop_type) != "GLOBAL":
                raise NotImplementedError(
                    f"{OP}: across ranks only BackpropType.GLOBAL is computed, got {backprop_type}"
                )
        with torch.no_grad():
            self.logit_scale.clamp_(self.logit_scale_min, self.logit_scale_max)
        options: dict[str, Any] = {
            "scale": self.logit_scale.exp(),
            "weights": None if mask is None else mask.to(torch.float32),
        }
        loss: Tensor = (distributed.info_nce if ranks > 1 else info_nce)(
            embeddings_a, embeddings_b, **options
        )
        return loss
