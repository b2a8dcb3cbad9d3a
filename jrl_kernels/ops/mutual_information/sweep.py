"""What a backend of the bounds implements, and the arithmetic around it that all of them share.

A backend visits u = scale * x @ y.T over all R = N L rows and C = N M columns tile by tile and keeps one sum per row or column:

    prepare(tensor) -> Tensor                                matrix operands as its kernels take them
    log_sum_exp(source, images, rows, columns) -> (x, y)     over each row's (column's) entries of other images
    softplus_sums(source, images) -> Tensor                  sum of softplus(u) over each row's entries of other images
    gradient(source, images, upstream) -> (tile, block)      d bound / du tile by tile

Own pairs are the N blocks [L, M] on the diagonal: what concerns them alone is computed here, a few blocks at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OWN_ELEMENTS = 1 << 22


class Images(NamedTuple):
    """Which image each row and column belongs to: int32, -1 for a location that does not count."""

    x: Tensor  # [R]
    y: Tensor  # [C]


class Upstream(NamedTuple):
    """What d bound / du is made of, besides u; a side is None where not wanted.

    An own pair has own * sigmoid(log_sum_x_r - u) + the same for y, or own alone for "dv". Any other has off * sigmoid(u) for
    "jsd", else weight_x_r exp(u - log_sum_x_r) + the same for y.
    """

    bound: str
    own: Tensor  # 0-d in the accumulation dtype, as is off
    off: Tensor
    log_sum_x: Tensor | None = None  # [R]
    weight_x: Tensor | None = None
    log_sum_y: Tensor | None = None  # [C]
    weight_y: Tensor | None = None


def images_of(side: Tensor, mask: Tensor | None) -> Tensor:
    """Image of each location of `side` [N, L, D], -1 where the mask [N, L] is False."""
    count, locations = side.shape[:2]
    image = torch.arange(count, dtype=torch.int32, device=side.device)[:, None].expand(count, locations)
    return (image if mask is None else torch.where(mask, image, -1)).flatten().contiguous()


class Counts(NamedTuple):
    """How many locations, pairs and candidates count, in float64, which holds them exactly."""

    x: Tensor  # [N]
    y: Tensor  # [N]
    own: Tensor  # 0-d: pairs of the same image
    off: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> Counts:
        def each(side: Tensor, mask: Tensor | None) -> Tensor:
            if mask is None:
                return side.new_full(side.shape[:1], side.shape[1], dtype=torch.float64)
            return mask.sum(1).double()

        cx, cy = each(x, x_mask), each(y, y_mask)
        own = (cx * cy).sum()
        return cls(cx, cy, own, cx.sum() * cy.sum() - own)

    def turned(self) -> Counts:
        return self._replace(x=self.y, y=self.x)

    def ceiling(self) -> Tensor:
        """Sum over own pairs of log K."""
        others = self.y.sum() - self.y
        return (self.x * self.y * others.log1p()).sum()

    def with_own(self, log_sum: Tensor, own_logit: float | None) -> Tensor:
        """log_sum [R], joined by the locations of the row's own image at a constant logit."""
        if own_logit is None or log_sum.numel() == 0:
            return log_sum
        constant = (self.y.log() + own_logit).to(log_sum.dtype)
        return torch.logaddexp(log_sum, constant.repeat_interleave(log_sum.numel() // self.y.numel()))


def mean_over(total: Tensor, count: Tensor) -> Tensor:
    """A mean in float64, 0 over nothing."""
    return torch.where(count > 0, total / count.clamp(min=1), 0.0)


def _own_blocks(x: Tensor, y: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Images, locations of x, and their products with the same images' locations of y: blocks [n, l, M]."""
    count, locations, width = x.shape
    others = y.shape[1]
    images = max(1, OWN_ELEMENTS // max(1, locations * others + (locations + others) * width))
    rows = max(1, OWN_ELEMENTS // max(1, others))
    for n in range(0, count, images):
        at = slice(n, n + images)
        right = y[at].to(dtype).mT
        for start in range(0, locations, rows):
            some = slice(start, start + rows)
            yield at, some, torch.bmm(x[at, some].to(dtype), right)


def own_softplus(
    x: Tensor, y: Tensor, scale: Tensor, log_sum: Tensor | None, x_mask: Tensor | None, y_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Over own pairs: the sum of softplus(log_sum_r - u), in float64, and each row's sum of sigmoid(log_sum_r - u), [R].

    log_sum [R] is 0 where it is None.
    """
    rests = scale.new_zeros(x.shape[:2]) if log_sum is None else log_sum.view(x.shape[:2])
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    weights = torch.zeros_like(rests)
    for at, some, products in _own_blocks(x, y, scale.dtype):
        difference = rests[at, some, None] - scale * products
        if x_mask is not None:
            difference = difference.masked_fill(~x_mask[at, some, None], -torch.inf)
        if y_mask is not None:
            difference = difference.masked_fill(~y_mask[at, None], -torch.inf)
        # Not F.softplus, which is its argument from 20 on: float64 tells the two apart.
        total -= F.logsigmoid(-difference).sum(dtype=torch.float64)
        weights[at, some] = difference.sigmoid().sum(2)
    return total, weights.flatten()


def own_sum(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Sum over own pairs of u, in float64: the product of sums, since locations that do not count are zero."""
    return (x.sum(1, dtype=torch.float64) * y.sum(1, dtype=torch.float64)).sum() * scale.double()
