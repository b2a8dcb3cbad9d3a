"""What a head sees of a picture: one vector and a map of token features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jrl.downstream.scenes import ScenePart
from jrl.encoders import EncoderOutput
from jrl.systems import System

# none; a class token; a class token and four registers
_PREFIXES = (0, 1, 5)
_ENCODED_AT_ONCE = 256


@dataclass
class Features:
    """What an image encoder says of N pictures.

    Attributes:
        global_: [N, D] one vector a picture.
        tokens: [N, L, W] token features.
    """

    global_: Tensor
    tokens: Tensor

    @property
    def map(self) -> Tensor:
        """[N, W, h, h]: the tokens where they lie in the picture.

        Raises:
            ValueError: they lie on no square grid.
        """
        return token_map(self.tokens)

    def rows(self, index: Tensor) -> Features:
        """Those of some pictures."""
        return Features(self.global_[index], self.tokens[index])

    def to(self, device: str | torch.device) -> Features:
        """The same on another device."""
        return Features(self.global_.to(device), self.tokens.to(device))


def token_map(tokens: Tensor) -> Tensor:
    """Tokens of a square picture as a map; class and register tokens in front of them are left out.

    Args:
        tokens: [B, L, W] with L = h², h² + 1 or h² + 5, row by row; 9 are taken for 3 · 3, not for 2 · 2 and 5 before them.

    Returns:
        [B, W, h, h].

    Raises:
        ValueError: the tokens lie on no square grid.
    """
    length = tokens.shape[1]
    side = math.isqrt(length)
    if not side or length - side * side not in _PREFIXES:
        raise ValueError(
            f"tokens: expected h·h patches, with 0, 1 or 5 tokens before them, to lay on a grid, got {length} tokens"
        )
    return tokens[:, length - side * side :].transpose(1, 2).unflatten(2, (side, side))


def trunk_of(encoder: nn.Module) -> nn.Module:
    """What heads look through: the `image_trunk` of a `System`, or another module itself."""
    return encoder.image_trunk if isinstance(encoder, System) else encoder


def encode(encoder: nn.Module, pixels: Tensor) -> Features:
    """Run an image encoder.

    Args:
        encoder: a `System`, by its `encode_image`, or a module from pictures to an `EncoderOutput`.
        pixels: [B, 3, H, W].

    Raises:
        TypeError: the encoder returns something else.
    """
    call: Callable[[Tensor], Any] = getattr(encoder, "encode_image", encoder)
    output = call(pixels)
    if not isinstance(output, EncoderOutput):
        raise TypeError(f"encoder: expected it to return an EncoderOutput, got {type(output).__name__}")
    return Features(output.global_, output.tokens)


@torch.no_grad()
def encode_part(encoder: nn.Module, part: ScenePart, device: str | torch.device = "cpu") -> Features:
    """Features of a whole part from an encoder at rest, on the CPU.

    Args:
        encoder: as for `encode`, on `device`; its mode is as before afterwards.
        part: the pictures.
        device: where the encoder is.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        found = [
            encode(encoder, pixels.to(device)).to("cpu") for pixels in part.pixels.split(_ENCODED_AT_ONCE)
        ]
    finally:
        encoder.train(was_training)
    return Features(
        torch.cat([piece.global_.float() for piece in found]),
        torch.cat([piece.tokens.float() for piece in found]),
    )


def positions(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of the places of a map, half of the channels for each axis.

    The wave lengths run geometrically from the whole picture, counted as 2, down to 1/16 of that.

    Args:
        height, width: of the map.
        channels: a multiple of 4.

    Returns:
        [height · width, channels], row by row.
    """
    frequencies = math.pi * torch.logspace(0, 4, channels // 4, base=2)
    waves = []
    for count in (height, width):
        angles = ((torch.arange(count) + 0.5) / count)[:, None] * frequencies
        waves.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    rows, columns = waves
    grid = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(grid, dim=2).flatten(0, 1)


class MapTokens(nn.Module):
    """A map of features as tokens that know where they lie: standardised, projected, with positions added.

    Args:
        in_channels: W of the map.
        width: of the tokens; a multiple of 4.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        # encoders differ in the scale of their tokens; standardised, one learning rate serves all
        self.standardise = nn.BatchNorm2d(in_channels, affine=False)
        self.project = nn.Conv2d(in_channels, width, 1)

    def forward(self, map_: Tensor) -> Tensor:
        """[B, W, h, w] to [B, h·w, width]."""
        tokens = self.project(self.standardise(map_)).flatten(2).transpose(1, 2)
        return tokens + positions(map_.shape[2], map_.shape[3], tokens.shape[2]).to(tokens)
