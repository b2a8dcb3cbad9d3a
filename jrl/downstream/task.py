"""The contract of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor, nn

from jrl.data.sample import Sample
from jrl.downstream.features import Features

Values: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a head is trained: AdamW with a linear warm-up over a tenth of the steps and a cosine.

    Attributes:
        epochs: over the training examples.
        lr: of the head.
        batch_size: examples in a step.
        weight_decay: of the matrices.
    """

    epochs: int
    lr: float
    batch_size: int = 32
    weight_decay: float = 0.01


class Task(ABC):
    """What is asked of the features of a picture.

    Examples are a dict of tensors of one length E; "image" [E] says which picture each is about.

    Attributes:
        name: of the task.
        metric: the score that stands for the task; higher is better, as for every score.
        recipe: of its head.
        panels: pictures that `draw` lays side by side.
    """

    name: str
    metric: str
    recipe: Recipe
    panels = 1

    @abstractmethod
    def prepare(self, samples: Sequence[Sample]) -> None:
        """Take from the training scenes whatever the targets need, such as a vocabulary."""

    @abstractmethod
    def examples(self, samples: Sequence[Sample]) -> Values:
        """The examples of some scenes."""

    @abstractmethod
    def head(self, global_width: int, token_width: int) -> nn.Module:
        """A head with fresh weights for vectors [B, global_width] and tokens [B, L, token_width]."""

    @abstractmethod
    def loss(self, head: nn.Module, features: Features, batch: Values) -> Tensor:
        """The 0-d loss of a batch of examples; row i of `features` is the picture of example i."""

    @abstractmethod
    def predict(self, head: nn.Module, features: Features, batch: Values) -> Values:
        """Predictions for a batch of examples, one row an example."""

    @abstractmethod
    def baseline(self, train: Values, test: Values) -> Values:
        """Predictions for the test examples by somebody who knows the training examples and sees no picture."""

    @abstractmethod
    def score(self, predictions: Values, examples: Values) -> dict[str, float]:
        """The scores of predictions, `metric` among them."""

    @abstractmethod
    def draw(self, axes: Axes, picture: np.ndarray, predictions: Values, examples: Values, row: int) -> None:
        """Draw one example: the picture [H, W, 3] in [0, 1], the truth and the prediction."""
