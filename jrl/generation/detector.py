"""What finds objects in pictures for the semantic object accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from jrl.data.scenes_drawing import SHAPES
from jrl.downstream.features import encode
from jrl.evaluation.object_accuracy import ObjectClass
from jrl.generation.classifier import CLASSES, SceneClassifier


class Detector(Protocol):
    """Anything that says how sure it is of each class; of a detector of boxes, the score of the best box."""

    @property
    def classes(self) -> Sequence[ObjectClass]:
        """What it knows, with the words of texts for it."""

    @property
    def threshold(self) -> float:
        """The least score with which an object counts as found."""

    def __call__(self, pictures: Tensor) -> Tensor:
        """Scores [B, len(classes)] of pictures [B, 3, H, W] in [0, 1]."""


class ClassifierDetector(nn.Module):
    """Coloured shapes by the scenes' classifier: the caption's "red circle" has to be a circle, and red.

    Args:
        classifier: trained.
        threshold: of its scores.
    """

    def __init__(self, classifier: SceneClassifier, threshold: float = 0.5) -> None:
        super().__init__()
        self.classifier, self.threshold = classifier, threshold
        self.classes = [ObjectClass(name) for name in CLASSES]

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores [B, 64] in [0, 1]."""
        logits: Tensor = self.classifier(pictures)[1]
        return logits.exp()


class HeadDetector(nn.Module):
    """Shapes, whatever their colour, by a head of `jrl probe --tasks detection` on an image encoder.

    Args:
        encoder: as `jrl.downstream.fit_head` returned it.
        head: the head of `jrl.downstream.Detection`.
        mean, std: of the pictures that the encoder expects, one a channel.
        threshold: of the scores of boxes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        threshold: float = 0.3,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.threshold = encoder, head, threshold
        self.classes = [ObjectClass(name) for name in SHAPES]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores [B, 8] in [0, 1]."""
        assert isinstance(self.mean, Tensor) and isinstance(self.std, Tensor)
        logits: Tensor = self.head(encode(self.encoder, (pictures - self.mean) / self.std).map)[0]
        return logits.sigmoid().amax(dim=1)
