"""What every encoder and every `encode_*` method returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class EncoderOutput:
    """One vector for each input and the tokens it was pooled from.

    Attributes:
        global_: [B, D] one vector an image or a text.
        tokens: [B, L, W] token features before any projection; W is the width of the trunk.
        mask: [B, L] bool, True where a token is real; None when all are.
    """

    global_: Tensor
    tokens: Tensor
    mask: Tensor | None = None
