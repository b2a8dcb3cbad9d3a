"""Shapes as polygons, and scenes of them drawn with smooth edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 215, 20),
    "green": (34, 150, 60),
    "blue": (35, 90, 205),
    "purple": (130, 50, 170),
    "pink": (255, 130, 190),
    "brown": (125, 75, 35),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (176, 176, 176), "black": (16, 16, 16)}
TEXTURES = ("plain", "striped", "dotted", "checkered")
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Shape:
    """One drawn object; lengths are fractions of the side of the picture.

    Attributes:
        shape, colour, size, texture: words, as in the captions.
        x, y: centre.
        radius: of the circle around the shape.
        angle: rotation in radians.
    """

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float = 0.0

    def outline(self) -> np.ndarray:
        """Corners [P, 2] of the polygon."""
        points = OUTLINES[self.shape]()
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turned = points @ np.array([[cos, sin], [-sin, cos]])
        return np.asarray(turned * self.radius + np.array([self.x, self.y]))

    def box(self) -> tuple[float, float, float, float]:
        """Smallest upright box (x0, y0, x1, y1) around the outline."""
        corners = self.outline()
        (x0, y0), (x1, y1) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
        return x0, y0, x1, y1


def _regular(corners: int, start: float) -> np.ndarray:
    angles = start + 2 * math.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    points = _regular(10, -math.pi / 2)
    points[1::2] *= 0.45
    return points


def _diamond() -> np.ndarray:
    return np.array([[0.0, -1.0], [0.62, 0.0], [0.0, 1.0], [-0.62, 0.0]])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1) / 17.0


def _cross() -> np.ndarray:
    a, b = 0.3, 0.95
    arm = np.array([[-a, -a], [-a, -b], [a, -b]])
    quarter = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, turns) for turns in range(4)])


OUTLINES: dict[str, Callable[[], np.ndarray]] = {
    "circle": lambda: _regular(72, 0.0),
    "square": lambda: _regular(4, math.pi / 4),
    "triangle": lambda: _regular(3, -math.pi / 2),
    "star": _star,
    "diamond": _diamond,
    "hexagon": lambda: _regular(6, 0.0),
    "heart": _heart,
    "cross": _cross,
}
SHAPES = tuple(OUTLINES)
# Radius within which a shape holds another one whole, as a fraction of its own radius.
ROOM_INSIDE = {"circle": 0.8, "square": 0.55, "hexagon": 0.72}


def draw_scene(shapes: Sequence[Shape], background: str, side: int) -> Image.Image:
    """The picture: later shapes cover earlier ones, edges are anti-aliased.

    Args:
        shapes: what to draw.
        background: "white", "grey" or "black".
        side: of the square picture in pixels.

    Returns:
        An RGB image.
    """
    fine = side * _OVERSAMPLING
    canvas = np.empty((fine, fine, 3), np.float32)
    canvas[:] = BACKGROUNDS[background]
    for shape in shapes:
        window, inside = _fill(shape, fine)
        canvas[window][inside] = _paint(shape, window, fine)[inside]
    coarse = canvas.reshape(side, _OVERSAMPLING, side, _OVERSAMPLING, 3).mean(axis=(1, 3))
    return Image.fromarray(np.rint(coarse).astype(np.uint8))


def draw_mask(shapes: Sequence[Shape], side: int) -> np.ndarray:
    """Index + 1 of the shape that covers most of each pixel, 0 where the background does.

    Args:
        shapes: as drawn.
        side: of the square picture in pixels.

    Returns:
        [side, side] uint8.
    """
    fine = side * _OVERSAMPLING
    top = np.zeros((fine, fine), np.int64)
    for index, shape in enumerate(shapes):
        window, inside = _fill(shape, fine)
        top[window][inside] = index + 1
    blocks = top.reshape(side, _OVERSAMPLING, side, _OVERSAMPLING)
    counts = np.stack([(blocks == index).sum(axis=(1, 3)) for index in range(len(shapes) + 1)])
    return counts.argmax(axis=0).astype(np.uint8)


def _fill(shape: Shape, fine: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window of the canvas that holds the shape, and the pixels of the window inside its outline."""
    # Pillow paints pixels by their centres, which lie half a pixel off the corner-based coordinates.
    corners = shape.outline() * fine - 0.5
    left, top = (int(v) for v in np.clip(np.floor(corners.min(axis=0)), 0, fine - 1))
    right, bottom = (int(v) for v in np.clip(np.ceil(corners.max(axis=0)) + 1, 1, fine))
    image = Image.new("1", (right - left, bottom - top))
    ImageDraw.Draw(image).polygon([(float(x) - left, float(y) - top) for x, y in corners], fill=1)
    return (slice(top, bottom), slice(left, right)), np.asarray(image)


def _paint(shape: Shape, window: tuple[slice, slice], fine: int) -> np.ndarray:
    rows, columns = window
    colour = np.array(COLOURS[shape.colour], np.float32)
    area = (rows.stop - rows.start, columns.stop - columns.start, 3)
    if shape.texture == "plain":
        return np.broadcast_to(colour, area)
    # Fewer repetitions on a small shape: at 64 pixels a finer pattern would blur to one colour.
    periods = 2.0 + 14.0 * shape.radius
    u = ((np.arange(columns.start, columns.stop) + 0.5) / fine - shape.x) / (2 * shape.radius) * periods
    v = ((np.arange(rows.start, rows.stop) + 0.5) / fine - shape.y)[:, None] / (2 * shape.radius) * periods
    if shape.texture == "striped":
        light = np.mod(u + v, 1.0) < 0.4
    elif shape.texture == "dotted":
        light = np.hypot(np.mod(u, 1.0) - 0.5, np.mod(v, 1.0) - 0.5) < 0.32
    else:
        light = (np.mod(u / 1.2, 1.0) < 0.5) ^ (np.mod(v / 1.2, 1.0) < 0.5)
    pale = 255 - (255 - colour) * 0.25
    return np.where(light[..., None], pale, colour)
