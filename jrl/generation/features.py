"""Networks that pictures are compared by: the scenes' classifier, or any other with its weights in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jrl.generation.classifier import SceneClassifier


class FeatureNetwork(nn.Module):
    """A network for Frechet distance and inception score out of modules that are made for other things.

    Args:
        features: pictures [B, 3, H, W] in [0, 1] to features [B, F], or to a pair of features and logits.
        logits: features to logits [B, classes], where `features` gives none; None for no inception score.
        prepare: pictures to what `features` expects, such as a resize, a normalisation or bytes.
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


def load_network(path: str | Path, *, allow_pickle: bool = False) -> nn.Module:
    """A network from pictures [B, 3, H, W] in [0, 1] to features [B, F], or to features and logits [B, classes].

    Args:
        path: a folder of `jrl scene-classifier`, or a file `*.pt2` that `torch.export.save` wrote, which holds any network with
            its weights.
        allow_pickle: take such a file, which can run code as it is opened: torch lets it hold pickled objects.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it is something else, or unreadable, or a file without leave.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"features: no folder or file {path}")
    if path.is_dir():
        return SceneClassifier.load(path)
    if path.suffix != ".pt2":
        raise ValueError(f"features: expected a folder of `jrl scene-classifier` or a file *.pt2, got {path}")
    if not allow_pickle:
        raise ValueError(
            f"{path}: exported programs may hold pickled objects and are read only with allow_pickle=True"
        )
    try:
        program: Any = torch.export.load(path)
    except Exception as error:  # a broken archive fails in many ways
        raise ValueError(f"{path}: not a program of `torch.export.save`: {error}") from error
    network: nn.Module = program.module()
    return network
