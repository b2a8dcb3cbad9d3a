"""The boxes that are ranked, and the part of a picture that a system sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Box: TypeAlias = tuple[float, float, float, float]
# as shares of the side of the square that the system sees
ANCHOR_SIDES = (0.2, 0.3, 0.45, 0.7, 1.0)


def anchors(size: int, sides: Sequence[float] = ANCHOR_SIDES) -> Tensor:
    """Square windows that cover a square picture, neighbours half a window apart or closer.

    Args:
        size: S, side of the picture in pixels.
        sides: of the windows, as shares of S.

    Returns:
        [K, 4] float64 of x0, y0, x1, y1: each side's windows row by row, in the order of `sides`.

    Raises:
        ValueError: a side outside (0, 1].
    """
    found: list[list[float]] = []
    for side in sides:
        if not 0 < side <= 1:
            raise ValueError(f"sides: expected shares in (0, 1], got {side}")
        # a rounding error must not add a row of windows
        count = 1 + math.ceil(2 * (1 - side) / side - 1e-9)
        starts = [i * (1 - side) / max(count - 1, 1) * size for i in range(count)]
        found += [[x, y, x + side * size, y + side * size] for y in starts for x in starts]
    return torch.tensor(found, dtype=torch.float64)


def seen_square(width: int, height: int) -> tuple[float, float, float]:
    """Left, top and side of the centre square of a picture, which is what `ImageTransform` shows a system."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, float(side)


def to_view(boxes: Sequence[Box], width: int, height: int, size: int) -> Tensor:
    """Boxes in pixels of a picture as boxes in pixels of what a system sees of it; they may stick out.

    Args:
        boxes: K of x0, y0, x1, y1.
        width, height: of the picture.
        size: side of what the system sees.

    Returns:
        [K, 4] float64.
    """
    left, top, side = seen_square(width, height)
    corner = torch.tensor([left, top, left, top], dtype=torch.float64)
    return (torch.tensor(list(boxes), dtype=torch.float64).reshape(-1, 4) - corner) * (size / side)
