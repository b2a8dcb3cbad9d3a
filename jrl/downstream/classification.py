"""Which shapes and which colours a picture shows: a linear probe on the encoder's vector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_average_precision

from jrl.data.sample import Sample
from jrl.data.scenes_drawing import COLOURS, SHAPES
from jrl.downstream.features import Features
from jrl.downstream.task import Recipe, Task, Values

LABELS = (*SHAPES, *COLOURS)


class Linear(nn.Module):
    """Standardised vectors, then one linear layer that begins with the frequencies of the labels.

    Args:
        width: of the vectors.
        frequency: [labels] of each label in training, in (0, 1).
    """

    def __init__(self, width: int, frequency: Tensor) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(width, affine=False)
        self.output = nn.Linear(width, len(frequency))
        nn.init.zeros_(self.output.weight)
        self.output.bias.data.copy_(frequency.logit())

    def forward(self, features: Features) -> Tensor:
        """Logits [B, labels]."""
        return self.output(self.standardise(features.global_))


class Classification(Task):
    """Each shape and each colour: present or not. Binary cross-entropy; mean average precision over the labels."""

    name = "classification"
    metric = "mean_average_precision"
    recipe = Recipe(epochs=40, lr=5e-3)

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Count the labels; one that is never seen counts as seen once in twice as many scenes."""
        labels = self.examples(samples)["labels"]
        self.frequency = (labels.sum(dim=0) + 0.5) / (len(labels) + 1)

    def examples(self, samples: Sequence[Sample]) -> Values:
        """ "labels" [E, 16]: 1 where the picture shows it."""
        labels = torch.zeros(len(samples), len(LABELS))
        for row, sample in enumerate(samples):
            for thing in sample.objects:
                for word in (thing.label, *thing.attributes):
                    if word in LABELS:
                        labels[row, LABELS.index(word)] = 1
        return {"image": torch.arange(len(samples)), "labels": labels}

    def head(self, global_width: int, token_width: int) -> nn.Module:
        """A linear probe."""
        return Linear(global_width, self.frequency)

    def loss(self, head: nn.Module, features: Features, batch: Values) -> Tensor:
        """Binary cross-entropy, mean over labels and pictures."""
        return F.binary_cross_entropy_with_logits(head(features), batch["labels"])

    def predict(self, head: nn.Module, features: Features, batch: Values) -> Values:
        """ "probabilities" [B, 16]."""
        return {"probabilities": head(features).sigmoid()}

    def baseline(self, train: Values, test: Values) -> Values:
        """The frequency of each label, the same for every picture."""
        return {"probabilities": train["labels"].mean(dim=0).expand(len(test["labels"]), -1)}

    def score(self, predictions: Values, examples: Values) -> dict[str, float]:
        """Average precision, the mean over the labels that occur, over the shapes and over the colours."""
        labels = examples["labels"].long()
        occurs = labels.any(dim=0)
        if not occurs.any():
            raise ValueError("labels: expected at least one that occurs, got none")
        # a label that never occurs has no average precision
        found = torch.zeros(len(LABELS))
        for place in occurs.nonzero().flatten().tolist():
            found[place] = binary_average_precision(predictions["probabilities"][:, place], labels[:, place])
        is_shape = torch.arange(len(LABELS)) < len(SHAPES)
        return {
            self.metric: float(found[occurs].mean()),
            "shapes": float(found[occurs & is_shape].mean()),
            "colours": float(found[occurs & ~is_shape].mean()),
        }

    def draw(self, axes: Axes, picture: np.ndarray, predictions: Values, examples: Values, row: int) -> None:
        """The picture over the labels it has and those predicted with a probability above a half."""
        axes.imshow(picture)
        lines = []
        for title, chosen in (("truth", examples["labels"]), ("said", predictions["probabilities"])):
            words = [label for label, value in zip(LABELS, chosen[row].tolist(), strict=True) if value > 0.5]
            lines.append(f"{title}: " + ", ".join(word for word in words if word in SHAPES))
            lines.append(", ".join(word for word in words if word in COLOURS))
        axes.set_xlabel("\n".join(lines), fontsize=7)
