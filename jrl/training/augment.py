"""Augmentation of a whole batch of small pictures at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.data.images import Augment

_LUMA = (0.299, 0.587, 0.114)


def augment_batch(pixels: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Crop, shift, flip and recolour every picture on its own, with the meaning of `Augment`'s fields.

    Args:
        pixels: [B, 3, S, S] float in [0, 1].
        augment: what to draw.
        generator: of the draws, on the CPU; their number does not depend on the fields.

    Returns:
        [B, 3, S, S] float in [0, 1].

    Raises:
        TypeError: `pixels` is not floating point.
        ValueError: `pixels` is not [B, 3, S, S], or `augment` has what is done to one picture at a time.
    """
    if augment.rand_augment is not None or augment.erase:
        raise ValueError(
            "augment: rand_augment and erase change one picture at a time, as it is read; set in_memory to false"
        )
    if not pixels.is_floating_point():
        raise TypeError(f"pixels: expected a floating dtype, got {pixels.dtype}")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
        raise ValueError(f"pixels: expected [B, 3, S, S], got {list(pixels.shape)}")
    draws = torch.rand(10, len(pixels), generator=generator).to(pixels)
    area, ratio, left, top, flip, right, down, brightness, contrast, saturation = draws
    if augment.scale != (1.0, 1.0) or augment.ratio != (1.0, 1.0) or augment.translate or augment.flip:
        pixels = _warp(pixels, augment, area, ratio, left, top, flip, right, down)
    luma = pixels.new_tensor(_LUMA)
    if augment.brightness:
        pixels = (pixels * _factor(brightness, augment.brightness)).clamp(0, 1)
    if augment.contrast:
        grey = torch.einsum("bchw,c->b", pixels, luma)[:, None, None, None] / pixels[0, 0].numel()
        pixels = (grey + (pixels - grey) * _factor(contrast, augment.contrast)).clamp(0, 1)
    if augment.saturation:
        grey = torch.einsum("bchw,c->bhw", pixels, luma)[:, None]
        pixels = (grey + (pixels - grey) * _factor(saturation, augment.saturation)).clamp(0, 1)
    return pixels


def _warp(
    pixels: Tensor,
    augment: Augment,
    area: Tensor,
    ratio: Tensor,
    left: Tensor,
    top: Tensor,
    flip: Tensor,
    right: Tensor,
    down: Tensor,
) -> Tensor:
    low, high = augment.scale
    share = low + (high - low) * area
    low, high = (math.log(value) for value in augment.ratio)
    shape = torch.exp(low + (high - low) * ratio)
    width, height = (share * shape).sqrt().clamp(max=1), (share / shape).sqrt().clamp(max=1)
    # output coordinate u in [−1, 1] reads input x = width·u + centre; a crop of the box [x0, x0 + width] of
    # [0, 1]
    centre_x = (2 * left - 1) * (1 - width) - 2 * width * augment.translate * (2 * right - 1)
    centre_y = (2 * top - 1) * (1 - height) - 2 * height * augment.translate * (2 * down - 1)
    sign = torch.where(flip < augment.flip, -1.0, 1.0)
    zero = torch.zeros_like(width)
    theta = torch.stack(
        [torch.stack([sign * width, zero, centre_x], dim=1), torch.stack([zero, height, centre_y], dim=1)],
        dim=1,
    )
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    # grid_sample pads with zeros, so the border's grey is taken off before and put back after
    warped = F.grid_sample(
        pixels - augment.fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return warped + augment.fill


def _factor(draw: Tensor, strength: float) -> Tensor:
    return (1 + (2 * draw - 1) * strength)[:, None, None, None]
