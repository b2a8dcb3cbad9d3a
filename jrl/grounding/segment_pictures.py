"""Pictures of segmentations: the picture, the truth, the answer, and what each stage groups."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from jrl.data.scenes_drawing import COLOURS
from jrl.evaluation.scene_segmentation import Scenes
from jrl.evaluation.segmentation import BACKGROUND, IGNORED
from jrl.training.files import write_atomically

_SIDE, _GAP, _TITLE = 1.15, 0.06, 0.2  # inches
_GROUND, _UNKNOWN = (0.93, 0.93, 0.93), (0.0, 0.0, 0.0)
_SMALLEST = 12  # pixels of a region that is worth a name


def save_segmentations(
    pictures: Sequence[PIL.Image.Image], scenes: Scenes, prediction: Tensor, maps: Any, path: str | Path
) -> None:
    """Write one row a picture.

    A class has the colour that its name says, and its name stands in its region; groups have colours of their own.

    Args:
        pictures: N of them.
        scenes: the same N.
        prediction: [N, H, W], 0 for background.
        maps: what the system's `group_maps` gave for them.
        path: of the PNG.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    stages = []
    product = None
    for hard in maps.hard:
        product = hard if product is None else product @ hard
        stages.append(product.argmax(dim=-1).unflatten(1, maps.grid).cpu().numpy())
    titles = [
        "picture",
        "truth",
        "prediction",
        *(f"groups, stage {1 + number}" for number in range(len(stages))),
    ]
    wide = len(titles) * (_SIDE + _GAP) + _GAP
    tall = len(pictures) * (_SIDE + _GAP) + _TITLE
    figure = Figure(figsize=(wide, tall))
    for row, picture in enumerate(pictures):
        groups = [
            _grouped(stage[row], int(hard.shape[2])) for stage, hard in zip(stages, maps.hard, strict=True)
        ]
        truth, answer = scenes.truth[row].numpy(), prediction[row].cpu().numpy()
        images = [np.asarray(picture), _painted(truth, scenes.names), _painted(answer, scenes.names), *groups]
        for column, image in enumerate(images):
            left, low = _GAP + column * (_SIDE + _GAP), tall - _TITLE - (row + 1) * (_SIDE + _GAP) + _GAP
            axes = figure.add_axes((left / wide, low / tall, _SIDE / wide, _SIDE / tall))
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("lightgrey")
            if not row:
                axes.set_title(titles[column], fontsize=7, pad=2)
            if column in (1, 2):
                _name(axes, (truth, answer)[column - 1], scenes.names)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _painted(classes: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """[H, W, 3]: every class in the colour of its name."""
    palette = np.zeros((IGNORED + 1, 3))
    palette[BACKGROUND], palette[IGNORED] = _GROUND, _UNKNOWN
    for number, name in enumerate(names, start=1):
        palette[number] = np.array(COLOURS[name.split()[0]]) / 255
    return palette[classes]


def _grouped(groups: np.ndarray, count: int) -> np.ndarray:
    colours = colormaps["turbo"](np.linspace(0.05, 0.95, max(count, 2)))[:, :3]
    return np.asarray(colours[groups])


def _name(axes: Axes, classes: np.ndarray, names: Sequence[str]) -> None:
    for number in np.unique(classes):
        if number in (BACKGROUND, IGNORED):
            continue
        rows, columns = np.nonzero(classes == number)
        if len(rows) >= _SMALLEST:
            text = names[number - 1].replace(" ", "\n")
            # names of small regions lie over each other: the later one stays readable
            outline = [withStroke(linewidth=1.2, foreground="white")]
            axes.text(
                columns.mean(), rows.mean(), text, fontsize=5, ha="center", va="center", path_effects=outline
            )
