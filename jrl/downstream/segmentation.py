"""The class of every pixel: a linear probe on the encoder's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from jrl.data.sample import Sample
from jrl.data.scenes_drawing import SHAPES
from jrl.downstream.features import Features
from jrl.downstream.task import Recipe, Task, Values

CLASSES = ("background", *SHAPES)
IGNORED = 255


class PixelClasses(nn.Module):
    """Standardised tokens, one linear layer for each of them, and bilinear interpolation to the pixels.

    Args:
        width: of the tokens.
        frequency: [classes] of each class among the training pixels, positive; the layer begins with them.
    """

    def __init__(self, width: int, frequency: Tensor) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm2d(width, affine=False)
        self.output = nn.Conv2d(width, len(frequency), 1)
        nn.init.zeros_(self.output.weight)
        assert self.output.bias is not None
        self.output.bias.data.copy_(frequency.log())

    def forward(self, map_: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [B, classes, *size]."""
        coarse = self.output(self.standardise(map_))
        return F.interpolate(coarse, size, mode="bilinear", align_corners=False)


class Segmentation(Task):
    """Background or one of the shapes for each pixel. Cross-entropy; mean intersection over union of the classes."""

    name = "segmentation"
    metric = "mean_iou"
    recipe = Recipe(epochs=20, lr=5e-3)
    panels = 3

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Count the classes of the pixels; one that is never seen counts as one pixel."""
        mask = self.examples(samples)["mask"]
        counts = torch.bincount(mask[mask != IGNORED].long(), minlength=len(CLASSES)) + 1.0
        self.frequency = counts / counts.sum()

    def examples(self, samples: Sequence[Sample]) -> Values:
        """ "mask" [E, H, W] uint8: index into CLASSES; 255 where an object has another label.

        Raises:
            ValueError: a scene has no mask.
        """
        masks = []
        for sample in samples:
            mask = sample.load_mask()
            if mask is None:
                raise ValueError(f"sample {sample.key!r}: has no mask")
            table = np.full(256, IGNORED, np.uint8)
            table[0] = 0
            for thing in sample.objects:
                if thing.mask_id is not None and thing.label in SHAPES:
                    table[thing.mask_id] = CLASSES.index(thing.label)
            masks.append(torch.from_numpy(table[mask]))
        return {"image": torch.arange(len(samples)), "mask": torch.stack(masks)}

    def head(self, global_width: int, token_width: int) -> nn.Module:
        """One linear layer over the tokens."""
        return PixelClasses(token_width, self.frequency)

    def loss(self, head: nn.Module, features: Features, batch: Values) -> Tensor:
        """Cross-entropy, mean over the pixels that are not ignored."""
        mask = batch["mask"]
        logits = head(features.map, tuple(mask.shape[1:]))
        total = F.cross_entropy(logits, mask.long(), ignore_index=IGNORED, reduction="sum")
        # a batch without a labelled pixel has a loss of nothing, not of 0 / 0
        return total / (mask != IGNORED).sum().clamp(min=1)

    def predict(self, head: nn.Module, features: Features, batch: Values) -> Values:
        """ "mask" [B, H, W] uint8."""
        logits = head(features.map, tuple(batch["mask"].shape[1:]))
        return {"mask": logits.argmax(dim=1).to(torch.uint8)}

    def baseline(self, train: Values, test: Values) -> Values:
        """The commonest class everywhere: the background."""
        counts = torch.bincount(train["mask"][train["mask"] != IGNORED].flatten().long(), minlength=1)
        return {"mask": torch.full_like(test["mask"], int(counts.argmax()))}

    def score(self, predictions: Values, examples: Values) -> dict[str, float]:
        """Intersection over union, the mean over the classes that occur in the truth or in the predictions."""
        confusion = multiclass_confusion_matrix(
            predictions["mask"].long(), examples["mask"].long(), len(CLASSES), ignore_index=IGNORED
        ).double()
        right = confusion.diagonal()
        union = confusion.sum(dim=0) + confusion.sum(dim=1) - right
        iou = right[union > 0] / union[union > 0]
        return {
            self.metric: float(iou.mean()),
            "pixel_accuracy": float(right.sum() / confusion.sum()),
        }

    def draw(self, axes: Axes, picture: np.ndarray, predictions: Values, examples: Values, row: int) -> None:
        """The picture, the truth and the prediction side by side."""
        table = np.ones((256, 3))
        table[0] = 0.93
        table[1 : len(CLASSES)] = colormaps["tab10"](np.arange(len(SHAPES)))[:, :3]
        truth, said = (table[values["mask"][row].numpy()] for values in (examples, predictions))
        gap = np.ones((len(picture), 2, 3))
        axes.imshow(np.concatenate([picture, gap, truth, gap, said], axis=1))
        axes.set_title("picture, truth, said", fontsize=7)
