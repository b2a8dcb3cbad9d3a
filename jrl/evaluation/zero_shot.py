"""Zero-shot classification accuracy."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_shot_accuracy(
    image: Tensor, classifier: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)
) -> dict[str, float]:
    """Share of pictures whose class is among the k most similar; ties count against it.

    Args:
        image: [N, D] float.
        classifier: [classes, D] float, one vector a class.
        labels: [N] int64.
        ks: cut-offs; those above the number of classes are left out.

    Raises:
        TypeError: `labels` is not int64.
        ValueError: shapes do not fit, or a label is out of range.
    """
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if image.ndim != 2 or classifier.ndim != 2 or image.shape[1] != classifier.shape[1]:
        raise ValueError(
            f"classifier: expected [classes, D] for [N, D], got {list(classifier.shape)}, {list(image.shape)}"
        )
    if labels.shape != (len(image),) or not len(image):
        raise ValueError(f"labels: expected [{len(image)}] with at least one, got {list(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= len(classifier):
        raise ValueError(f"labels: expected values in [0, {len(classifier)})")
    scores = image @ classifier.T
    right = scores.gather(1, labels[:, None])
    ranks = (~(scores < right)).sum(dim=1) - 1
    return {f"top{k}": float((ranks < k).double().mean()) for k in ks if k <= len(classifier)}
