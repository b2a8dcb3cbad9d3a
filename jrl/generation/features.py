"""Networks that pictures are compared by: the scenes' classifier, or any other with its weights in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jrl.generation.classifier import SceneClassifier


class FeatureNetwork(nn.Module):
    """A network for the two metrics out of one, or two, that are made for other things.

    Args:
        features: pictures [B, 3, H, W] in [0, 1] to features [B, F], for the Frechet distance.
        logits: features to logits [B, classes], for the inception score; None for no score.
        prepare: pictures to what `features` expects, such as a resize or bytes.

    Example:
        An Inception network of torchvision: its pooled features, and its last layer for the logits.
    """

    def __init__(
        self,
        features: nn.Module,
        logits: nn.Module | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.features, self.logits, self.prepare = features, logits, prepare

    def forward(self, pictures: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features, and logits where there is a network for them."""
        found = self.features(pictures if self.prepare is None else self.prepare(pictures))
        return found if self.logits is None else (found, self.logits(found))


def load_network(path: str | Path) -> nn.Module:
    """A network from pictures [B, 3, H, W] in [0, 1] to features [B, F], or to features and logits [B, classes].

    Args:
        path: a folder of `jrl scene-classifier`, or a file `*.pt2` that `torch.export.save` wrote, which holds any network with
            its weights.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it is something else, or unreadable.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"features: no folder or file {path}")
    if path.is_dir():
        return SceneClassifier.load(path)
    if path.suffix != ".pt2":
        raise ValueError(f"features: expected a folder of `jrl scene-classifier` or a file *.pt2, got {path}")
    try:
        program: Any = torch.export.load(path)
    except Exception as error:  # a broken archive fails in many ways
        raise ValueError(f"{path}: not a program of `torch.export.save`: {error}") from error
    network: nn.Module = program.module()
    return network
