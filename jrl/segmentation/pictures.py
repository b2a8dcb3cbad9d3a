"""Index masks in colour, overlays with a legend, and what each stage of the encoder groups."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jrl.data.images import save_image
from jrl.data.readers.masks import IGNORED
from jrl.segmentation.segment import Segmented, pixels_of
from jrl.systems import GroupViT
from jrl.systems.group_vit_segmentation import upsample
from jrl.training.files import write_atomically
from jrl.training.run import Run

_SIDE = 3.2  # inches of a panel's width
_GAP, _TITLE, _LINE = 0.15, 0.34, 0.2
_TALLEST, _LEAST = 1.6, 1.4  # a panel's height by its width, and inches between two titles
_DRAWN = 640  # more pixels than that show nothing more
_LETTERS = 9.5  # of a legend to the inch
_STRENGTH = 0.6  # of a colour over its picture
_IGNORED_COLOUR = (224, 224, 192)
# a name may hold dollars, which matplotlib would read as formulas
_TEXT: dict[str, Any] = {"fontsize": 9, "parse_math": False}


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
        title: over it.
        pixels: uint8 [H, W, 3].
    """

    title: str
    pixels: np.ndarray


def palette() -> np.ndarray:
    """uint8 [256, 3], the colours of Pascal VOC: three bits of a number at a time become the next high bits of its colour."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * place + channel)) & 1).astype(np.uint8) << (7 - place)
    colours[IGNORED] = _IGNORED_COLOUR
    return colours


def save_mask(index: np.ndarray, path: str | Path) -> None:
    """Write class numbers uint8 [H, W] as an indexed PNG in VOC's colours."""
    picture = PIL.Image.fromarray(np.ascontiguousarray(index))
    picture.putpalette(palette().ravel().tolist())
    save_image(picture, path)


def overlay(picture: PIL.Image.Image, index: np.ndarray, colours: np.ndarray | None = None) -> np.ndarray:
    """A picture [H, W, 3] under the colours of its classes, uint8, at most 640 pixels a side; borders are drawn white.

    Args:
        picture: RGB, as large as `index`.
        index: uint8 [H, W].
        colours: uint8 [256, 3] of every number; VOC's when None, and then 0, the background, stays clear.
    """
    small = picture.copy()
    small.thumbnail((_DRAWN, _DRAWN))
    numbers = np.asarray(PIL.Image.fromarray(index).resize(small.size, PIL.Image.Resampling.NEAREST))
    pixels = np.asarray(small.convert("RGB"), np.float32)
    mixed = (1 - _STRENGTH) * pixels + _STRENGTH * (palette() if colours is None else colours)[numbers]
    if colours is None:
        mixed[numbers == 0] = pixels[numbers == 0]
    border = np.zeros(numbers.shape, bool)
    border[1:] |= numbers[1:] != numbers[:-1]
    border[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    mixed[border] = 255
    return mixed.round().astype(np.uint8)


def save_overlay(
    picture: PIL.Image.Image,
    found: Segmented,
    path: str | Path,
    *,
    truth: tuple[np.ndarray, Sequence[str]] | None = None,
) -> None:
    """Write a picture beside its classes in colour, over a legend of those that occur, the largest first.

    Args:
        picture: RGB.
        found: its segmentation.
        path: of the PNG.
        truth: the true numbers uint8 [H, W] and the names of all classes, to be shown too.
    """
    legend = {
        result.number: f"{result.name}  {100 * result.share:.1f} %"
        for result in sorted(found.results, key=lambda result: -result.share)
        if result.share
    }
    panels = [_plain("picture", picture), Panel("classes", overlay(picture, found.index))]
    if truth is not None:
        numbers, names = truth
        panels.append(Panel("truth", overlay(picture, numbers)))
        for number in np.unique(numbers).tolist():
            legend.setdefault(number, "counts nowhere" if number == IGNORED else names[number])
    _save(panels, path, legend)


def save_stages(run: Run, system: GroupViT, picture: PIL.Image.Image, size: int, path: str | Path) -> None:
    """Write which patches each stage of the encoder puts into one group, a colour a group, for the picture as a whole.

    A stage's groups are made of those of the stage before. The last panel is what a segmentation by soft maps takes: at each
    pixel the group with most of the product of the soft maps.

    Args:
        run: whose preprocessing it is.
        system: of the run.
        picture: RGB.
        size: pixels of the short side that the encoder sees.
        path: of the PNG.
    """
    pixels = pixels_of(run, picture, size)
    height, width = pixels.shape[2:]
    maps, patch = system.group_maps(pixels), system.image_encoder.patch_size
    panels = [_plain("picture", picture)]
    product = None
    for number, hard in enumerate(maps.hard, start=1):
        product = hard if product is None else product @ hard
        # a patch has one group, so nothing lies between two
        cells = product[0].argmax(dim=-1).unflatten(0, maps.grid)
        whole = cells.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[:height, :width]
        panels.append(_groups(f"stage {number}", whole, product.shape[-1], picture))
    soft = upsample(maps.product, maps.grid, patch, (height, width))[0].argmax(dim=0)
    panels.append(_groups("soft maps", soft, maps.product.shape[-1], picture))
    _save(panels, path, {})


def _groups(title: str, index: torch.Tensor, groups: int, picture: PIL.Image.Image) -> Panel:
    numbers = (index.cpu() % 256).numpy().astype(np.uint8)
    whole = PIL.Image.fromarray(numbers).resize(picture.size, PIL.Image.Resampling.NEAREST)
    # hues a golden angle apart: any few of them are far from each other
    hues = np.arange(256) * 0.618034 % 1
    colours = 255 * hsv_to_rgb(np.stack([hues, np.full(256, 0.8), np.full(256, 0.95)], axis=1))
    title = f"{title}: {len(index.unique())} of {groups} groups"
    return Panel(title, overlay(picture, np.asarray(whole), colours))


def _plain(title: str, picture: PIL.Image.Image) -> Panel:
    small = picture.convert("RGB")
    small.thumbnail((_DRAWN, _DRAWN))
    return Panel(title, np.asarray(small))


def _save(panels: Sequence[Panel], path: str | Path, legend: dict[int, str]) -> None:
    """Panels of one picture side by side, and a legend of colours under them."""
    height, width = panels[0].pixels.shape[:2]
    ratio = height / width
    # a very tall picture is drawn narrower
    side, tall = (_SIDE, _SIDE * ratio) if ratio <= _TALLEST else (_SIDE * _TALLEST / ratio, _SIDE * _TALLEST)
    step = max(side, _LEAST) + _GAP
    labels = [textwrap.shorten(label, 60, placeholder=" …") for label in legend.values()]
    longest = max((len(label) for label in labels), default=1) / _LETTERS + 0.5
    wide = max(len(panels) * step, longest) + _GAP
    columns = int(wide / longest)
    under = _LINE * -(-len(labels) // columns) + (_GAP if labels else 0)
    whole = tall + _TITLE + under + _GAP
    figure = Figure(figsize=(wide, whole))
    for place, panel in enumerate(panels):
        left = _GAP + place * step
        axes = figure.add_axes((left / wide, (under + _GAP) / whole, side / wide, tall / whole))
        axes.imshow(panel.pixels, aspect="auto", interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("lightgrey")
        axes.set_title(panel.title, color="dimgrey", **_TEXT)
    colours = palette() / 255
    for place, (number, label) in enumerate(zip(legend, labels, strict=True)):
        row, column = divmod(place, columns)
        x, y = _GAP + column * wide / columns, under - (row + 0.5) * _LINE
        face = "white" if number == 0 else tuple(colours[number])
        corner, size = (x / wide, (y - 0.06) / whole), (0.16 / wide, 0.12 / whole)
        figure.add_artist(Rectangle(corner, *size, facecolor=face, edgecolor="grey", linewidth=0.6))
        figure.text((x + 0.22) / wide, y / whole, label, va="center", **_TEXT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
