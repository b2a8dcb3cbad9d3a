"""XMC-GAN's generator and discriminator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.systems.xmc_gan.blocks import (
    ConditionalBatchNorm,
    DiscriminatorBlock,
    GeneratorBlock,
    normalise_spectra,
    pointwise,
    square,
)
from jrl_kernels import word_context

START = 4
"""Places a side where the generator begins and the discriminator ends."""

GENERATOR_CHANNELS = {32: (2, 2, 1), 64: (8, 4, 2, 1), 128: (16, 8, 4, 2, 1), 256: (16, 8, 8, 4, 2, 1)}
DISCRIMINATOR_CHANNELS = {
    32: (1, 2, 4, 4),
    64: (1, 2, 4, 8, 8),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
}
"""Channels of the blocks as multiples of the base width, by picture size: 128 and 256 from the code, the others ours."""


class Generator(nn.Module):
    """One stage from noise and words to a picture, with attentional self-modulation.

    From a 4 x 4 grid each block doubles the size. Blocks below `attention_size` are modulated by [W e_s; z]; at that size every
    place j attends to the words, c_j = Σ_i softmax_i(ρ cos(w_i, h_j)) w_i / |w_i|, and from there on blocks are modulated place
    by place by [c_j; W e_s; z]. Zhang et al. 2021 and US 2023/0081171 (XMC-GAN): the code's network at 128 and 256 pixels.

    Args:
        image_size: 32, 64, 128, 256, or any 4·2ⁿ from 16 on with `channels`.
        text_dim: E, width of words and sentence.
        width: base width.
        noise_dim: width of z.
        condition_dim: of W e_s.
        channels: multiples of `width`, one a block; those of `image_size` when None.
        attention_size: places a side where the words are attended to; 16, or 8 below 64 pixels, when None.
        attention_scale: ρ.
        first_input: what the 4 x 4 grid is made of: "noise" (the code) or "noise_and_text" (the patent).
        backend: of the attention op.

    Raises:
        ValueError: a size that the blocks do not reach, a number out of range, or another `first_input`.
    """

    def __init__(
        self,
        image_size: int = 128,
        text_dim: int = 768,
        width: int = 96,
        *,
        noise_dim: int = 128,
        condition_dim: int = 128,
        channels: Sequence[int] | None = None,
        attention_size: int | None = None,
        attention_scale: float = 15.0,
        first_input: str = "noise",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if first_input not in ("noise", "noise_and_text"):
            raise ValueError(f"first_input: expected 'noise' or 'noise_and_text', got {first_input!r}")
        _check_sizes(text_dim=text_dim, width=width, noise_dim=noise_dim, condition_dim=condition_dim)
        if not 0 < attention_scale < math.inf:
            raise ValueError(f"attention_scale: expected a positive number, got {attention_scale}")
        multiples = _multiples("channels", channels, GENERATOR_CHANNELS, image_size, "Generator")
        attention_size = _region_size(attention_size, image_size)
        global_blocks = _halvings("attention_size", attention_size)
        if not 0 < global_blocks < len(multiples):
            raise ValueError(
                f"attention_size: expected between {2 * START} and {image_size // 2}, got {attention_size}"
            )
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "text_dim": text_dim,
            "width": width,
            "noise_dim": noise_dim,
            "condition_dim": condition_dim,
            "channels": list(multiples),
            "attention_size": attention_size,
            "attention_scale": attention_scale,
            "first_input": first_input,
            "backend": backend,
        }
        self.noise_dim, self.first_input = noise_dim, first_input
        self.attention_scale, self.backend = attention_scale, backend
        widths = [multiple * width for multiple in multiples]
        self.condition = nn.Linear(text_dim, condition_dim)
        self.start_channels = widths[0]
        first = noise_dim + (condition_dim if first_input == "noise_and_text" else 0)
        self.start = nn.Linear(first, START * START * widths[0])
        everywhere = condition_dim + noise_dim
        ins = [widths[0], *widths[:-1]]
        self.global_blocks = nn.ModuleList(
            GeneratorBlock(i, o, everywhere)
            for i, o in zip(ins[:global_blocks], widths[:global_blocks], strict=True)
        )
        self.region = pointwise(widths[global_blocks - 1], text_dim)
        local = everywhere + text_dim
        self.local_blocks = nn.ModuleList(
            GeneratorBlock(i, o, local)
            for i, o in zip(ins[global_blocks:], widths[global_blocks:], strict=True)
        )
        self.norm = ConditionalBatchNorm(widths[-1], local)
        self.pixels = square(widths[-1], 3)
        _initialize(self)

    def forward(self, noise: Tensor, sentence: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        """Pictures of texts.

        Args:
            noise: [B, noise_dim], normal.
            sentence: [B, E].
            words: [B, T, E].
            word_mask: bool [B, T], True where a word is real.

        Returns:
            [B, 3, H, W] in [0, 1].
        """
        condition = torch.cat([self.condition(sentence), noise], dim=1)
        first = condition if self.first_input == "noise_and_text" else noise
        x = self.start(first).view(len(noise), self.start_channels, START, START)
        everywhere = condition[:, :, None, None]
        for block in self.global_blocks:
            x = block(x, everywhere)
        places = self.region(x)
        context = word_context(
            places.flatten(2).mT,
            words.to(places.dtype),
            word_mask=word_mask,
            attention_scale=self.attention_scale,
            backend=self.backend,
        )
        grid = context.mT.reshape(places.shape)
        local = torch.cat([grid, everywhere.expand(-1, -1, *grid.shape[2:])], dim=1)
        for block in self.local_blocks:
            x = block(x, local)
        return (torch.tanh(self.pixels(F.relu(self.norm(x, local)))) + 1) / 2


@dataclass
class Judgement:
    """What the discriminator says of pictures and their texts.

    Attributes:
        logits: [B] real (high) or generated (low).
        image: [B, F] features of the pictures.
        sentence: [B, F] of the texts.
        regions: [B, R, E] of places, comparable with words.
    """

    logits: Tensor
    image: Tensor
    sentence: Tensor
    regions: Tensor

    def halves(self) -> tuple[Judgement, Judgement]:
        """What is said of the first half of the pictures, and of the second."""
        first, second = zip(*(value.chunk(2) for value in vars(self).values()), strict=True)
        return Judgement(*first), Judgement(*second)


class Discriminator(nn.Module):
    """Judges pictures, alone and with their text, and encodes them for the contrastive losses.

        logit = w·h + b + h · (W e_s),   h = Σ over places of ReLU(features)

    a projection discriminator whose h and W e_s are also the features of the sentence loss (no head of their own: the
    ablation has that best); the map of `region_size` places, through a 1x1 convolution, gives the regions of the word loss.
    Every weight is divided by its spectral norm.

    Args:
        image_size: 32, 64, 128, 256, or any 4·2ⁿ from 16 on with `channels`.
        text_dim: E.
        width: base width.
        channels: multiples of `width`, one a block, of which the last keeps the size; those of `image_size` when None.
        region_size: places a side of the regions; 16, or 8 below 64 pixels, when None.

    Raises:
        ValueError: a size that the blocks do not reach, or a number out of range.
    """

    def __init__(
        self,
        image_size: int = 128,
        text_dim: int = 768,
        width: int = 96,
        *,
        channels: Sequence[int] | None = None,
        region_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(text_dim=text_dim, width=width)
        multiples = _multiples(
            "channels", channels, DISCRIMINATOR_CHANNELS, image_size, "Discriminator", extra=1
        )
        region_size = _region_size(region_size, image_size)
        self.region_block = _halvings("image_size", image_size) - _halvings("region_size", region_size) - 1
        if not 0 <= self.region_block < len(multiples) - 1:
            raise ValueError(
                f"region_size: expected between {START} and {image_size // 2}, got {region_size}"
            )
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "text_dim": text_dim,
            "width": width,
            "channels": list(multiples),
            "region_size": region_size,
        }
        widths = [multiple * width for multiple in multiples]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(i, o, downsample=place < len(widths) - 1, first=place == 0)
            for place, (i, o) in enumerate(zip([3, *widths[:-1]], widths, strict=True))
        )
        self.region = pointwise(widths[self.region_block], text_dim)
        self.logit = nn.Linear(widths[-1], 1)
        self.sentence = nn.Linear(text_dim, widths[-1])
        _initialize(self)
        normalise_spectra(self)

    def forward(self, images: Tensor, sentence: Tensor) -> Judgement:
        """Judge pictures [B, 3, H, W] in [0, 1] with their sentence vectors [B, E]."""
        x = images
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place == self.region_block:
                regions = self.region(x).flatten(2).mT
        pooled = F.relu(x).sum(dim=(2, 3))
        projected = self.sentence(sentence)
        logits = self.logit(pooled)[:, 0] + (pooled * projected).sum(dim=1)
        return Judgement(logits, pooled, projected, regions)


def _multiples(
    name: str,
    given: Sequence[int] | None,
    known: dict[int, tuple[int, ...]],
    image_size: int,
    network: str,
    extra: int = 0,
) -> tuple[int, ...]:
    blocks = _halvings("image_size", image_size) + extra
    if image_size < 4 * START:
        raise ValueError(f"image_size: expected at least {4 * START}, got {image_size}")
    if given is None:
        if image_size not in known:
            raise ValueError(
                f"image_size: {network} has no table for {image_size}; name {name}, or one of {', '.join(map(str, known))}"
            )
        return known[image_size]
    if len(given) != blocks or min(given) < 1:
        raise ValueError(
            f"{name}: expected {blocks} positive multiples for {image_size} pixels, got {list(given)}"
        )
    return tuple(given)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def _halvings(name: str, size: int) -> int:
    """n of size = 4·2ⁿ."""
    steps = round(math.log2(max(size, 1) / START))
    if steps < 0 or size != START << steps:
        raise ValueError(f"{name}: expected {START} times a power of two, got {size}")
    return steps


def _region_size(given: int | None, image_size: int) -> int:
    return given if given is not None else max(2 * START, min(16, image_size // 4))


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
