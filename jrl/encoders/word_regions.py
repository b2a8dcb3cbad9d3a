"""Which regions of a picture each word of its caption attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class WordRegions:
    """Attention of the words of B captions over the regions of their own pictures.

    Attributes:
        attention: [B, T, R], rows of valid words sum to one over regions.
        grid: rows and columns of the R regions, which lie row by row.
        mask: [B, T] bool, True where a word is real.
        shift: rows and columns, in regions, by which the centre of each lies beyond the middle of its share of the picture.
    """

    attention: Tensor
    grid: tuple[int, int]
    mask: Tensor
    shift: tuple[float, float] = (0.0, 0.0)
