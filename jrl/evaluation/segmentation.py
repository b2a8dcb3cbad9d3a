"""Zero-shot segmentation: intersection over union, and what trivial answers reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from jrl.data.sample import Sample, SceneObject

IGNORED = 255
BACKGROUND = 0


class SegmentationScore:
    """Mean intersection over union of many pictures, from one confusion matrix.

    Args:
        classes: how many there are, the background (class 0) included.

    Raises:
        ValueError: fewer than 2 or more than 255 classes.
    """

    def __init__(self, classes: int) -> None:
        if not 2 <= classes <= IGNORED:
            raise ValueError(f"classes: expected 2 to {IGNORED}, got {classes}")
        self.classes = classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.float64)  # [truth, prediction]

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add pictures.

        Args:
            prediction: integers [..., H, W] in [0, classes).
            truth: likewise; 255 is ignored.

        Raises:
            ValueError: the shapes differ, or a value is out of range.
        """
        if prediction.shape != truth.shape:
            raise ValueError(f"prediction: expected {list(truth.shape)}, got {list(prediction.shape)}")
        if not truth.numel():
            return
        for name, values in (("prediction", prediction), ("truth", truth[truth != IGNORED])):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.classes:
                raise ValueError(f"{name}: expected values in [0, {self.classes})")
        found = multiclass_confusion_matrix(
            prediction.long(), truth.long(), self.classes, ignore_index=IGNORED
        )
        self.confusion += found.to(self.confusion)

    def class_iou(self) -> Tensor:
        """Intersection over union of each class [classes]; NaN for one that occurs neither in truth nor in prediction."""
        return _iou(self.confusion)

    def compute(self) -> dict[str, float]:
        """Scores over all pictures.

        Returns:
            "mean_iou" over the classes that occur in truth or prediction; "foreground_iou", the mean over the
            classes but the background, counting only pixels whose truth is not background; "background_iou"
            and "pixel_accuracy". 0 where nothing occurs.
        """
        iou = self.class_iou()
        foreground = self.confusion.clone()
        foreground[BACKGROUND] = 0
        right = self.confusion.diagonal().sum()
        return {
            "mean_iou": _mean(iou),
            "foreground_iou": _mean(_iou(foreground)[BACKGROUND + 1 :]),
            "background_iou": _mean(iou[BACKGROUND : BACKGROUND + 1]),
            "pixel_accuracy": float(right / self.confusion.sum().clamp(min=1)),
        }


def trivial_baselines(
    truth: Tensor, classes: int, *, groups: int = 8, seed: int = 0
) -> dict[str, dict[str, float]]:
    """What one class everywhere and random groups reach.

    Args:
        truth: integers [N, H, W] in [0, classes), 255 ignored.
        classes: how many there are.
        groups: regions a picture is cut into, each the pixels nearest to one of as many random points.
        seed: of points and classes.

    Returns:
        "single_class" (the one with the best mean IoU) and "random_groups", as `SegmentationScore.compute`.
    """
    # one class everywhere has its share of the pixels as its own IoU, and 0 for every other class that occurs
    frequency = torch.bincount(truth[truth != IGNORED].long(), minlength=1)
    single = SegmentationScore(classes)
    single.update(torch.full_like(truth, int(frequency.argmax())), truth)
    generator = torch.Generator().manual_seed(seed)
    count, height, width = truth.shape
    points = torch.rand(count, groups, 2, generator=generator) * torch.tensor([height, width])
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
    nearest = torch.cdist(grid.reshape(1, -1, 2).float(), points).argmin(dim=-1)  # [N, H · W]
    chosen = torch.randint(classes, (count, groups), generator=generator)
    score = SegmentationScore(classes)
    score.update(chosen.gather(1, nearest).view_as(truth), truth.cpu())
    return {
        "single_class": single.compute(),
        "random_groups": score.compute(),
    }


def scene_label(thing: SceneObject) -> str:
    """ "red circle": the colour and the shape of an object of a generated scene."""
    return f"{thing.attributes[-1]} {thing.label}"


def class_mask(
    sample: Sample, names: Sequence[str], label: Callable[[SceneObject], str] | None = None
) -> Tensor:
    """The class of every pixel: 0 for background, i + 1 for `names[i]`, 255 for an object of no such class.

    Args:
        sample: with a mask.
        names: of the classes without the background.
        label: name of an object; its `label` when None.

    Returns:
        uint8 [H, W].

    Raises:
        ValueError: no mask, or more than 254 names.
    """
    mask = sample.load_mask()
    if mask is None:
        raise ValueError(f"sample {sample.key!r}: has no mask")
    if len(names) >= IGNORED:
        raise ValueError(f"names: expected at most {IGNORED - 1}, got {len(names)}")
    numbers = {name: number for number, name in enumerate(names, start=1)}
    found = np.full(mask.shape, IGNORED, np.uint8)
    found[mask == 0] = BACKGROUND
    for thing in sample.objects:
        if thing.mask_id is not None:
            name = thing.label if label is None else label(thing)
            found[mask == thing.mask_id] = numbers.get(name, IGNORED)
    return torch.from_numpy(found)


def _iou(confusion: Tensor) -> Tensor:
    """[classes], NaN for one that occurs in neither truth nor prediction."""
    right = confusion.diagonal()
    return right / (confusion.sum(dim=0) + confusion.sum(dim=1) - right)


def _mean(values: Tensor) -> float:
    there = values[~values.isnan()]
    return float(there.mean()) if len(there) else 0.0
