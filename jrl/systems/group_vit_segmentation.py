"""From groups, their maps and the classes' texts to the class of every pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.encoders.group_vit_blocks import GroupMap

PRODUCTS = ("soft", "hard")
MODES = ("code", "patent")


@dataclass
class GroupMaps:
    """Which group each patch belongs to, stage by stage and in all.

    Attributes:
        soft: of each stage [B, S, G], S the patches or the groups of the stage before; rows sum to 1.
        hard: likewise, one-hot.
        product: [B, R, G] the product of the soft maps, from the R patches to the groups of the last stage.
        hard_product: [B, R, G] the product of the hard maps, one-hot.
        grid: (rows, columns) of the patches, R = rows · columns.
    """

    soft: list[Tensor]
    hard: list[Tensor]
    product: Tensor
    hard_product: Tensor
    grid: tuple[int, int]


@dataclass
class Segmentation:
    """The class of every pixel.

    Attributes:
        scores: [B, C, H, W] of each class.
        background: [B, H, W] 1 where the pixel is background (between 0 and 1 where windows disagree); None
            without a threshold.
        index: int64 [B, H, W], the class, or −1 for background.
    """

    scores: Tensor
    background: Tensor | None
    index: Tensor


def compose(stages: list[GroupMap], grid: tuple[int, int]) -> GroupMaps:
    """The maps of all stages with their products.

    Args:
        stages: the maps of the encoder, soft ones included.
        grid: of the patches.

    Raises:
        ValueError: a stage has no soft map.
    """
    soft, hard = [], [stage.hard for stage in stages]
    for stage in stages:
        if stage.soft is None:
            raise ValueError("stages: expected soft maps, which `GroupViTImageEncoder.group` makes")
        soft.append(stage.soft)
    product, hard_product = soft[0], hard[0]
    for soft_map, hard_map in zip(soft[1:], hard[1:], strict=True):
        product, hard_product = product @ soft_map, hard_product @ hard_map
    return GroupMaps(soft, hard, product, hard_product, grid)


def upsample(map_: Tensor, grid: tuple[int, int], patch: int, size: tuple[int, int]) -> Tensor:
    """A map over patches to one over pixels, bilinearly.

    Args:
        map_: [B, R, G].
        grid: (rows, columns), R = rows · columns.
        patch: side of a patch in pixels.
        size: (H, W) of the picture, which the patches cover.

    Returns:
        [B, G, H, W].
    """
    square = map_.mT.unflatten(2, grid)
    whole = (grid[0] * patch, grid[1] * patch)
    return F.interpolate(square, whole, mode="bilinear", align_corners=False)[:, :, : size[0], : size[1]]


def class_scores(
    segments: Tensor,
    image: Tensor,
    classes: Tensor,
    pixels: Tensor,
    *,
    scale: Tensor | float,
    mode: str,
    top_k: int | None,
    background_threshold: float | None,
) -> Tensor:
    """Score of each class at each pixel, that of the background first when there is a threshold.

    Args:
        segments: [B, G, D] unit vectors of the groups.
        image: [B, D] unit vectors of the pictures.
        classes: [C, D] unit vectors of the classes.
        pixels: [B, G, H, W] how much each pixel belongs to each group; its largest wins.
        scale: inverse temperature of the softmax over classes.
        mode: "code" (p₀ p₁) or "patent" (cosines).
        top_k: in p₁, only the classes nearest to the picture; None for all.
        background_threshold: a pixel whose best class is below it and below the best of all groups is background.

    Returns:
        [B, C, H, W] or [B, 1 + C, H, W].
    """
    cosines = segments @ classes.T  # [B, G, C]
    if mode == "patent":
        of_groups = cosines
    else:
        affinity = scale * cosines
        of_groups = affinity.softmax(dim=-1)
        if top_k is not None and top_k < len(classes):
            nearest = (image @ classes.T).topk(top_k, dim=-1).indices
            others = torch.ones_like(affinity[:, 0], dtype=torch.bool).scatter(1, nearest, False)
            affinity = affinity.masked_fill(others[:, None], -torch.inf)
        of_groups = of_groups * affinity.softmax(dim=-1)
    winner = pixels.argmax(dim=1).flatten(1)  # [B, H · W]
    scores = of_groups.gather(1, winner[:, :, None].expand(-1, -1, len(classes)))
    scores = scores.mT.unflatten(2, pixels.shape[2:])
    if background_threshold is None:
        return scores
    best = scores.amax(dim=1, keepdim=True)
    # of all groups, as in the code: the best one may have won no pixel
    threshold = of_groups.amax(dim=(1, 2)).clamp(max=background_threshold)[:, None, None, None]
    return torch.cat([(best < threshold).to(scores.dtype), scores], dim=1)


def slide(score: Callable[[Tensor], Tensor], pixel_values: Tensor, window: int, stride: int) -> Tensor:
    """Mean of the scores of all windows that cover a pixel; the last of a row ends at the border.

    Args:
        score: pictures [B, 3, h, w] to scores [B, C, h, w].
        pixel_values: [B, 3, H, W].
        window: side of a window; a side of the picture that is shorter is taken whole.
        stride: from one window to the next.
    """
    height, width = pixel_values.shape[2:]
    total: Tensor | None = None
    count = pixel_values.new_zeros(height, width)
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            found = score(pixel_values[place])
            if total is None:
                total = found.new_zeros(len(found), found.shape[1], height, width)
            total[place] += found
            count[place] += 1
    assert total is not None
    return total / count


def as_segmentation(scores: Tensor, with_background: bool) -> Segmentation:
    """Take the background apart and pick the best class of every pixel."""
    best = scores.argmax(dim=1)
    if not with_background:
        return Segmentation(scores, None, best)
    return Segmentation(scores[:, 1:], scores[:, 0], best - 1)


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(side - window, 0)
    return sorted({*range(0, last, stride), last})
