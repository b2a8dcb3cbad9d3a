"""RandAugment on Pillow pictures, with strengths that grow, as GroupViT's code sets it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps

Colour = tuple[int, int, int]
Operation = Callable[[PIL.Image.Image, float, int, Colour], PIL.Image.Image]
_BILINEAR = PIL.Image.Resampling.BILINEAR


@dataclass(frozen=True)
class RandAugment:
    """A few random operations one after the other, each drawn from fifteen and applied with a probability.

    Cubuk et al. 2020; the defaults are timm's "rand-m9-mstd0.5-inc1". An operation's strength in [0, 1] is a tenth of a magnitude
    drawn from a normal distribution; its direction, where it has one, is drawn.

    Args:
        operations: how many are drawn.
        magnitude: mean of the magnitude, 0 to 10.
        magnitude_std: its standard deviation.
        probability: of each operation that was drawn to be applied.

    Raises:
        ValueError: a value out of range.
    """

    operations: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.operations < 1:
            raise ValueError(f"operations must be at least 1, got {self.operations}")
        if not 0 <= self.magnitude <= 10:
            raise ValueError(f"magnitude must lie in [0, 10], got {self.magnitude}")
        if self.magnitude_std < 0:
            raise ValueError(f"magnitude_std must not be negative, got {self.magnitude_std}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {self.probability}")

    def __call__(
        self, picture: PIL.Image.Image, generator: np.random.Generator, fill: Colour = (128, 128, 128)
    ) -> PIL.Image.Image:
        """Change an RGB picture; its size stays.

        Args:
            picture: to change.
            generator: the only source of randomness; the number of draws does not depend on them.
            fill: colour of what moves in from outside.
        """
        operations = list(OPERATIONS.values())
        for number in generator.integers(len(operations), size=self.operations).tolist():
            applied, sign = generator.uniform(size=2)
            magnitude = generator.normal(self.magnitude, self.magnitude_std)
            if applied < self.probability:
                strength = min(max(magnitude, 0.0), 10.0) / 10
                picture = operations[number](picture, strength, -1 if sign < 0.5 else 1, fill)
        return picture


def _move(picture: PIL.Image.Image, matrix: tuple[float, ...], fill: Colour) -> PIL.Image.Image:
    """Output (x, y) takes the input at (a x + b y + c, d x + e y + f)."""
    return picture.transform(
        picture.size, PIL.Image.Transform.AFFINE, matrix, resample=_BILINEAR, fillcolor=fill
    )


def _rotate(picture: PIL.Image.Image, strength: float, sign: int, fill: Colour) -> PIL.Image.Image:
    return picture.rotate(sign * 30 * strength, resample=_BILINEAR, fillcolor=fill)


def _shear_x(picture: PIL.Image.Image, strength: float, sign: int, fill: Colour) -> PIL.Image.Image:
    return _move(picture, (1, sign * 0.3 * strength, 0, 0, 1, 0), fill)


def _shear_y(picture: PIL.Image.Image, strength: float, sign: int, fill: Colour) -> PIL.Image.Image:
    return _move(picture, (1, 0, 0, sign * 0.3 * strength, 1, 0), fill)


def _translate_x(picture: PIL.Image.Image, strength: float, sign: int, fill: Colour) -> PIL.Image.Image:
    return _move(picture, (1, 0, sign * 0.45 * strength * picture.width, 0, 1, 0), fill)


def _translate_y(picture: PIL.Image.Image, strength: float, sign: int, fill: Colour) -> PIL.Image.Image:
    return _move(picture, (1, 0, 0, 0, 1, sign * 0.45 * strength * picture.height), fill)


def _posterize(picture: PIL.Image.Image, strength: float, sign: int, fill: Colour) -> PIL.Image.Image:
    # four bits of each channel are left, down to none at the very end; PIL.ImageOps refuses none
    mask = 256 - 2 ** (4 + math.floor(4 * strength))
    return picture.point([value & mask for value in range(256)] * 3)


def _solarize(picture: PIL.Image.Image, strength: float, sign: int, fill: Colour) -> PIL.Image.Image:
    return PIL.ImageOps.solarize(picture, 256 - math.floor(256 * strength))


def _solarize_add(picture: PIL.Image.Image, strength: float, sign: int, fill: Colour) -> PIL.Image.Image:
    """Make the dark half of the values brighter."""
    more = math.floor(110 * strength)
    return picture.point([value + more if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: Callable[[PIL.Image.Image], Any]) -> Operation:
    def operation(picture: PIL.Image.Image, strength: float, sign: int, fill: Colour) -> PIL.Image.Image:
        return kind(picture).enhance(max(0.1, 1 + sign * 0.9 * strength))

    return operation


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda picture, strength, sign, fill: PIL.ImageOps.autocontrast(picture),
    "equalize": lambda picture, strength, sign, fill: PIL.ImageOps.equalize(picture),
    "invert": lambda picture, strength, sign, fill: PIL.ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(PIL.ImageEnhance.Color),
    "contrast": _enhance(PIL.ImageEnhance.Contrast),
    "brightness": _enhance(PIL.ImageEnhance.Brightness),
    "sharpness": _enhance(PIL.ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
