"""Heat maps of words and phrases over their pictures."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from jrl.data.images import load_image
from jrl.grounding.attention import Grounder, WordMaps, attend
from jrl.grounding.candidates import Box, seen_square, to_view
from jrl.grounding.examples import Example
from jrl.grounding.scores import MIDDLE, Shift, cell_ranges, heat_maps, inside, peaks, pointing
from jrl.training.files import write_atomically
from jrl.training.run import Run

_COLUMNS = 6
# inches: a picture's width, between two, over one, a line of a caption, the narrowest figure
_SIDE, _GAP, _TITLE, _LINE, _LEAST = 1.7, 0.12, 0.38, 0.17, 3.7
_LETTERS = 11  # of a caption to the inch
_TALLEST = 2.0  # height by width
_DRAWN = 320  # more pixels than that show nothing more
# a caption may hold dollars, which matplotlib would read as formulas
_CAPTION: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "parse_math": False}
_FINE = 128  # side of a heat map in points
_CROSSES = 4
_RIGHT, _WRONG, _BOX = "#15803d", "#b91c1c", "#22d3ee"


@dataclass(frozen=True)
class Word:
    """A word of a caption and where its attention is highest.

    Attributes:
        text: the word.
        attention: [rows, columns] over the regions; None where no token of it was kept.
        points: (x, y) of the highest points, in pixels of the picture; several where several cells tie.
        share: of the attention in the region where it is highest.
    """

    text: str
    attention: Tensor | None
    points: tuple[tuple[float, float], ...]
    share: float


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: over it.
        cells: [rows, columns] over the square that the system sees.
        boxes: true ones, in pixels of the picture.
        colour: of the title.
        shift: of the cells.
    """

    title: str
    cells: Tensor
    boxes: tuple[Box, ...] = ()
    colour: str = "black"
    shift: Shift = MIDDLE


@dataclass(frozen=True)
class Strip:
    """A caption, its picture, and the heat maps of its parts."""

    caption: str
    picture: PIL.Image.Image
    panels: tuple[Panel, ...]


def words_of(maps: WordMaps, width: int, height: int) -> list[Word]:
    """The words of a caption, split at white space, with their attention.

    Args:
        maps: of the caption.
        width, height: of its picture in pixels.
    """
    left, top, side = seen_square(width, height)
    found = []
    for match in re.finditer(r"\S+", maps.caption):
        own = maps.phrase(*match.span())
        if own is None:
            found.append(Word(match.group(), None, (), 0.0))
            continue
        points = tuple((left + x * side, top + y * side) for x, y in highest(own, maps.shift))
        found.append(Word(match.group(), own, points, float(own.max())))
    return found


def highest(cells: Tensor, shift: Shift = MIDDLE) -> list[tuple[float, float]]:
    """(x, y) of the centres of the highest cells of [rows, columns], in shares of the sides."""
    rows, columns = cells.shape
    return [
        ((x + 0.5 + shift[1]) / columns, (y + 0.5 + shift[0]) / rows)
        for y, x in peaks(cells).nonzero().tolist()
    ]


def word_strip(maps: WordMaps, words: Sequence[Word], picture: PIL.Image.Image) -> Strip:
    """A panel for each word that has attention."""
    panels = [
        Panel(word.text, word.attention, shift=maps.shift) for word in words if word.attention is not None
    ]
    return Strip(maps.caption, picture, tuple(panels))


def phrase_strips(run: Run, system: Grounder, examples: Sequence[Example]) -> list[Strip]:
    """A panel for each phrase, with its true boxes; the title is green where the highest point lies in one.

    Args:
        run: of the system.
        system: what attends.
        examples: a strip each.
    """
    pictures = [load_image(example.image, name=example.name) for example in examples]
    size, strips = run.transform.size, []
    attended = attend(run, system, pictures, [example.caption for example in examples])
    for example, picture, maps in zip(examples, pictures, attended, strict=True):
        panels = []
        for phrase in example.phrases:
            own = maps.phrase(phrase.start, phrase.end)
            if own is None:
                continue
            truth = to_view(phrase.boxes, *example.size, size)
            held = inside(cell_ranges(truth, maps.grid, size, maps.shift), maps.grid).any(dim=0)
            colour = _RIGHT if float(pointing(own, held)) >= 0.5 else _WRONG
            title = example.caption[phrase.start : phrase.end]
            panels.append(Panel(title, own, phrase.boxes, colour, maps.shift))
        strips.append(Strip(example.caption, picture, tuple(panels)))
    return strips


def save_strips(strips: Sequence[Strip], path: str | Path) -> None:
    """Write captions one under the other: the picture, then its panels, at most six beside each other.

    Heat is drawn from clear (none) to yellow (the panel's highest); crosses mark the highest points, of more than four ties the
    first four. What the system
    does not see of a picture stays without heat.

    Args:
        strips: at least one.
        path: of the PNG.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    columns = max(min(_COLUMNS, 1 + len(strip.panels)) for strip in strips)
    wide = max(columns * (_SIDE + _GAP) + _GAP, _LEAST)
    captions = [textwrap.wrap(strip.caption, int(wide * _LETTERS)) for strip in strips]
    # a very tall picture is drawn narrower than the others
    sides = [_SIDE * min(strip.picture.height / strip.picture.width, _TALLEST) for strip in strips]
    lines = [-(-(1 + len(strip.panels)) // columns) for strip in strips]
    heights = [
        _LINE * (len(caption) + 0.8) + count * (side + _TITLE)
        for caption, side, count in zip(captions, sides, lines, strict=True)
    ]
    tall = sum(heights) + _GAP
    # placed by hand: layouts that matplotlib computes leave much room beside pictures of a fixed shape
    figure = Figure(figsize=(wide, tall))
    top = tall
    for strip, caption, side, height in zip(strips, captions, sides, heights, strict=True):
        figure.text(_GAP / wide, (top - _LINE) / tall, "\n".join(caption), va="top", **_CAPTION)
        start = top - _LINE * (len(caption) + 0.8)
        for number in range(1 + len(strip.panels)):
            line, column = divmod(number, columns)
            x, y = _GAP + column * (_SIDE + _GAP), start - (line + 1) * (side + _TITLE)
            axes = figure.add_axes((x / wide, y / tall, _SIDE / wide, side / tall))
            _draw(axes, strip.picture, strip.panels[number - 1] if number else None)
        top -= height
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())


def _draw(axes: Axes, picture: PIL.Image.Image, panel: Panel | None) -> None:
    width, height = picture.size
    small = picture.copy()
    small.thumbnail((_DRAWN, _DRAWN))
    pixels = np.asarray(small.convert("RGB"), dtype=np.float32) / 255
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("lightgrey")
    if panel is None:
        axes.imshow(pixels, extent=(0, width, height, 0))
        axes.set_title("picture", fontsize=8, color="grey")
        return
    left, top, side = seen_square(width, height)
    # paler and grey, so that the colours of the heat are not those of the picture
    grey = 0.35 + 0.65 * pixels.mean(axis=2, keepdims=True).repeat(3, axis=2)
    axes.imshow(grey, extent=(0, width, height, 0))
    heat = heat_maps(panel.cells, _FINE, panel.shift)
    strength = (heat / heat.max().clamp(min=1e-12)).numpy()
    colours = colormaps["plasma"](strength)
    colours[..., 3] = 0.85 * strength
    axes.imshow(colours, extent=(left, left + side, top + side, top))
    for x0, y0, x1, y1 in panel.boxes:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=_BOX, linewidth=1.5))
    for x, y in highest(panel.cells, panel.shift)[:_CROSSES]:
        axes.plot(left + x * side, top + y * side, "x", color="black", markersize=6, markeredgewidth=1.5)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    title = textwrap.fill(panel.title, 26, max_lines=2, placeholder=" …")
    axes.set_title(title, fontsize=8, color=panel.colour, parse_math=False)
