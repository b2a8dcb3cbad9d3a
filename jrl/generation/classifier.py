"""A classifier of generated scenes: which coloured shapes a picture shows, and features to compare pictures by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from jrl.data.scenes_drawing import COLOURS, SHAPES
from jrl.training.files import write_atomically

CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""What a scene shows, as its captions say it: "red circle"."""

GRID = 16
"""Cells a side in which the classifier looks for shapes."""

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_LEAST = 1e-6


@dataclass
class Cells:
    """What the classifier says of each cell of B pictures.

    Attributes:
        features: [B, F, 16, 16].
        present: [B, 16, 16] logits: a shape covers the cell.
        colour: [B, 8, 16, 16] logits of its colour.
        shape: [B, 8, 16, 16] logits of its shape.
    """

    features: Tensor
    present: Tensor
    colour: Tensor
    shape: Tensor


class SceneClassifier(nn.Module):
    """Finds coloured shapes cell by cell; a picture shows a class as much as the cell that shows it most.

        p(class | x) = max_cell p(present) p(colour) p(shape)

    Colour and shape are told apart, since 64 pairs from scratch take many times as long. The features of a picture are the
    mean of the last layer's over the cells.

    Args:
        image_size: 32 or 64 pixels a side; pictures of another size are resized.
        width: channels of the first layer; the features are four times as wide.

    Raises:
        ValueError: a size or width out of range.
    """

    def __init__(self, image_size: int = 32, width: int = 24) -> None:
        super().__init__()
        if image_size not in (2 * GRID, 4 * GRID):
            raise ValueError(f"image_size: expected {2 * GRID} or {4 * GRID}, got {image_size}")
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        self.image_size, self.width, self.num_features = image_size, width, 4 * width
        middle = 2 * width
        self.trunk = nn.Sequential(
            _layer(3, width, stride=image_size // (2 * GRID)),
            _layer(width, middle, stride=2),
            _layer(middle, middle),
            # dilated, so that a cell sees the whole of a large shape
            _layer(middle, middle, dilation=2),
            _layer(middle, middle, dilation=3),
            _layer(middle, self.num_features),
        )
        self.head = nn.Conv2d(self.num_features, 1 + len(COLOURS) + len(SHAPES), 1)

    def cells(self, pictures: Tensor) -> Cells:
        """What it says of each cell of pictures [B, 3, H, W] in [0, 1]."""
        size = (self.image_size, self.image_size)
        if pictures.shape[-2:] != size:
            pictures = F.interpolate(
                pictures, size=size, mode="bilinear", align_corners=False, antialias=True
            )
        features = self.trunk(pictures - 0.5)
        present, colour, shape = self.head(features).split([1, len(COLOURS), len(SHAPES)], dim=1)
        return Cells(features, present[:, 0], colour, shape)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, F] and logits [B, 64] of pictures [B, 3, H, W] in [0, 1].

        Logits are logarithms of the scores of the classes, so that their softmax, which the inception score takes, shares a
        picture among what it shows.
        """
        found = self.cells(pictures)
        scores = (
            found.present.sigmoid()[:, None, None]
            * found.colour.softmax(dim=1)[:, :, None]
            * found.shape.softmax(dim=1)[:, None]
        )
        best = scores.flatten(1, 2).amax(dim=(2, 3))
        return found.features.mean(dim=(2, 3)), best.clamp(min=_LEAST).log()

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`.

        Raises:
            OSError: they cannot be written.
        """
        config = {"network": type(self).__name__, "image_size": self.image_size, "width": self.width}
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_atomically(Path(folder) / WEIGHTS, safetensors.torch.save(state))
        write_atomically(Path(folder) / CONFIG, json.dumps(config, indent=2).encode())

    @classmethod
    def load(cls, folder: str | Path) -> SceneClassifier:
        """Open what `save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: the folder or a file is missing.
            ValueError: a file is unreadable or does not fit.
        """
        folder = Path(folder)
        for path in (folder / CONFIG, folder / WEIGHTS):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; expected a folder of `jrl scene-classifier`")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if not isinstance(config, dict) or config.pop("network", None) != cls.__name__:
                raise ValueError(f"expected the config of a {cls.__name__}")
            network = cls(**config)
            network.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        except (UnicodeDecodeError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder}: not a classifier of scenes: {error}") from error
        return network.eval()


def _layer(ins: int, outs: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(ins, outs, 3, stride, dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outs), nn.ReLU())
