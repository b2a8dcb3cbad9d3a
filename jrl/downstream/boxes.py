"""Boxes and the average precision of detections, as COCO counts it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_RECALLS = torch.arange(101, dtype=torch.float64) / 100


def box_iou(a: Tensor, b: Tensor, *, generalised: bool = False) -> Tensor:
    """Intersection over union |A ∩ B| / |A ∪ B| of every pair of boxes; 0 where the union is empty.

    The generalised one (Rezatofighi et al. 2019) takes off the share of the smallest box around both that
    neither covers, so that boxes apart have a gradient too.

    Args:
        a: [..., N, 4] of x0, y0, x1, y1.
        b: [..., M, 4].
        generalised: in [−1, 1] rather than [0, 1].

    Returns:
        [..., N, M].
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    overlap = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - overlap
    iou = overlap / union.clamp(min=1e-12)
    if not generalised:
        return iou
    around = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return iou - (around - union) / around.clamp(min=1e-12)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(dim=-1)


@torch.no_grad()
def average_precision(
    scores: Tensor,
    labels: Tensor,
    boxes: Tensor,
    true_labels: Tensor,
    true_boxes: Tensor,
    thresholds: tuple[float, ...] = THRESHOLDS,
) -> Tensor:
    """Average precision of each class at each overlap.

    Detections of a class are taken in the order of their scores over all pictures. One is right when the true
    box of its class and picture that it overlaps most, among those not yet found, is overlapped by at least the
    threshold. Precision is made non-increasing and averaged at the recalls 0, 0.01, …, 1.

    Args:
        scores: [N, K] of the detections of N pictures.
        labels: [N, K] int64, a class each; −1 for none.
        boxes: [N, K, 4] of x0, y0, x1, y1.
        true_labels: [N, M] int64; −1 for none.
        true_boxes: [N, M, 4].
        thresholds: overlaps.

    Returns:
        [classes that occur in `true_labels`, thresholds] float64, classes in ascending order.

    Raises:
        ValueError: no true object at all.
    """
    classes = true_labels[true_labels >= 0].unique()
    if not len(classes):
        raise ValueError("true_labels: expected at least one object, got none")
    iou = box_iou(boxes.double(), true_boxes.double())
    found = [_of_class(scores, labels == c, iou, true_labels == c, thresholds) for c in classes]
    return torch.stack(found)


def _of_class(
    scores: Tensor, is_class: Tensor, iou: Tensor, is_truth: Tensor, thresholds: tuple[float, ...]
) -> Tensor:
    pictures, places = is_class.nonzero(as_tuple=True)
    # stable, so that equal scores keep the order of the pictures
    order = scores[pictures, places].argsort(descending=True, stable=True)
    overlaps = iou[pictures, places][order].numpy()
    # a box moved by a rounding error must not fall below its threshold
    levels = np.arange(len(thresholds)), np.asarray(thresholds) - 1e-9
    free = is_truth.numpy()[:, None].repeat(len(thresholds), axis=1)
    rights = np.zeros((len(thresholds), len(order)))
    for rank, picture in enumerate(pictures[order].tolist()):
        left = np.where(free[picture], overlaps[rank], -1.0)
        which = left.argmax(axis=1)
        right = left[levels[0], which] >= levels[1]
        free[picture, levels[0][right], which[right]] = False
        rights[right, rank] = 1.0
    return torch.stack([_area_under(right, int(is_truth.sum())) for right in torch.from_numpy(rights)])


def _area_under(right: Tensor, truths: int) -> Tensor:
    hits = right.cumsum(0)
    recall, precision = hits / truths, hits / torch.arange(1, len(right) + 1, dtype=torch.float64)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    place = torch.searchsorted(recall, _RECALLS - 1e-12)
    reached = place < len(right)
    values = torch.zeros(len(_RECALLS), dtype=torch.float64)
    values[reached] = envelope[place[reached]]
    return values.mean()
