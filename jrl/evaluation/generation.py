"""Frechet Inception distance and inception score of generated pictures, from the features of any network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

_AT_ONCE = 8192


class _AsGiven(nn.Module):
    """Stands for the feature network of a metric of torchmetrics: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@torch.no_grad()
def frechet_inception_distance(real: Tensor, generated: Tensor) -> float:
    """Distance of two sets of pictures as Gaussians in the space of their features; lower is better.

        |μ_1 − μ_2|² + Tr(C_1 + C_2 − 2 (C_1 C_2)^½)

    Heusel et al. 2017, by torchmetrics, in float64; covariances are unbiased (over N − 1). It falls as sets grow: distances
    compare at equal numbers of pictures only, and with fewer pictures than features the covariances lack rank.

    Args:
        real: [N, F] features, one row a picture.
        generated: [M, F].

    Raises:
        ValueError: fewer than 2 rows, widths that differ, or a value that is not finite.
    """
    for name, rows in (("real", real), ("generated", generated)):
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(
                f"{name}: expected features [N, F] of at least 2 pictures, got {list(rows.shape)}"
            )
        _check_finite(name, rows)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"generated: expected features of width {real.shape[1]}, as `real`, got {generated.shape[1]}"
        )
    metric = FrechetInceptionDistance(feature=_AsGiven(real.shape[1])).to(real.device)
    for rows, is_real in ((real, True), (generated, False)):
        for some in rows.split(_AT_ONCE):
            metric.update(some.double(), real=is_real)
    # a distance between equal sets comes out as a rounding error of either sign
    return max(0.0, float(metric.compute()))


@torch.no_grad()
def inception_score(logits: Tensor, *, splits: int = 1, seed: int = 0) -> tuple[float, float | None]:
    """How sure a classifier is of each picture, and how many classes it sees in all; higher is better.

        IS = exp(mean_x KL(p(y | x) ‖ mean_x p(y | x))),    p(y | x) = softmax(logits)

    Salimans et al. 2016, in float64. The rows are shuffled and cut into `splits` parts of equal size, to one row, each with a
    mean of its own: 1 is what XMC-GAN's code does, 10 what the paper of the score does.

    Args:
        logits: [N, classes].
        splits: parts.
        seed: of the shuffle; torch's own generator has no part in it.

    Returns:
        The mean over the parts, and their standard deviation, None for a single part.

    Raises:
        ValueError: fewer rows than parts, less than one part, or a value that is not finite.
    """
    if splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(
            f"logits: expected [N, classes] with at least {splits} rows, got {list(logits.shape)}"
        )
    _check_finite("logits", logits)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits.double().cpu().log_softmax(dim=1)[order].tensor_split(splits):
        mean = part.logsumexp(dim=0) - math.log(len(part))
        scores.append((part.exp() * (part - mean)).sum(dim=1).mean().exp())
    together = torch.stack(scores)
    return float(together.mean()), None if splits == 1 else float(together.std())


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
