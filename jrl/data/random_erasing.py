"""Random erasing: a rectangle of noise over a picture."""

from __future__ import annotations

import math

import numpy as np

_AREA = (0.02, 1 / 3)  # share of the picture's
_LOG_RATIO = math.log(1 / 0.3)  # of height by width, either way
_TRIES = 10


def erase(pixels: np.ndarray, probability: float, generator: np.random.Generator) -> np.ndarray:
    """Replace a random rectangle by standard normal noise, value by value.

    Zhong et al. 2020, with timm's ranges and its mode "pixel". A rectangle that does not fit is drawn again, ten times at most.

    Args:
        pixels: float [C, H, W], normalised.
        probability: of doing it.
        generator: the only source of randomness.

    Returns:
        The same array without, a new one with a rectangle.
    """
    if generator.uniform() >= probability:
        return pixels
    channels, height, width = pixels.shape
    for _ in range(_TRIES):
        area = height * width * generator.uniform(*_AREA)
        ratio = math.exp(generator.uniform(-_LOG_RATIO, _LOG_RATIO))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if tall < height and wide < width:
            top, left = (
                int(generator.integers(side - own, endpoint=True))
                for side, own in ((height, tall), (width, wide))
            )
            erased = pixels.copy()
            noise = generator.standard_normal((channels, tall, wide))
            erased[:, top : top + tall, left : left + wide] = noise
            return erased
    return pixels
