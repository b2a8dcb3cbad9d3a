"""Which part of a picture fills a square: the centre in evaluation, a random box in training."""

from __future__ import annotations

import math

import numpy as np

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


def centre_box(width: int, height: int) -> Box:
    """The largest square, in the centre."""
    return _in_the_centre(width, height, 1.0, 1.0)


def random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> Box:
    """The crop of torchvision's RandomResizedCrop: drawn until it fits, at most ten times, then the largest in the centre.

    Args:
        width, height: of the picture.
        scale: least and largest share of its area, drawn uniformly.
        ratio: least and largest width / height, drawn uniformly in the logarithm.
        generator: the only source of randomness.
    """
    low, high = ratio
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        shape = math.exp(generator.uniform(math.log(low), math.log(high)))
        w, h = max(math.sqrt(area * shape), 1.0), max(math.sqrt(area / shape), 1.0)
        if w <= width and h <= height:
            left, top = generator.uniform(0, 1) * (width - w), generator.uniform(0, 1) * (height - h)
            return left, top, min(left + w, float(width)), min(top + h, float(height))
    return _in_the_centre(width, height, low, high)


def _in_the_centre(width: int, height: int, low: float, high: float) -> Box:
    """The largest box whose width / height is the picture's, clamped to [low, high]."""
    ratio = min(max(width / height, low), high)
    w, h = min(float(width), height * ratio), min(float(height), width / ratio)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
