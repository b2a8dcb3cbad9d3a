"""The class of every pixel of one picture, at the picture's own size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.segmentation.classes import Classes
from jrl.systems import GroupViT
from jrl.training.run import Run

# the published evaluation resizes into 2048 × 448
_LONGEST = 2048 / 448


@dataclass(frozen=True)
class Options:
    """How a picture is looked at; the arguments of `GroupViT.segment`.

    Attributes:
        size: pixels of its short side; its long side is at most 2048/448 times as long, so a very long picture is smaller.
        mode: "code" or "patent".
        top_k: classes that are left in a picture ("code"); None for all.
        threshold: score below which a pixel is background; None for no such background.
        window: side of sliding windows; None to look at the whole at once.
        stride: from one window to the next; half a window when None.
    """

    size: int
    mode: str = "code"
    top_k: int | None = 5
    threshold: float | None = None
    window: int | None = None
    stride: int | None = None


@dataclass(frozen=True)
class ClassResult:
    """What became of one class in a picture.

    Attributes:
        name: of the class.
        number: in the index mask.
        share: of the pixels.
        score: mean over its pixels; None without pixels, and for a background by threshold.
        best: highest at any pixel; None for a background by threshold.
        cosine: with the whole picture; None for a background by threshold.
    """

    name: str
    number: int
    share: float
    score: float | None
    best: float | None
    cosine: float | None


@dataclass(frozen=True)
class Segmented:
    """A segmented picture.

    Attributes:
        index: uint8 [H, W] of the picture's own size: numbers of `Classes.names`.
        results: of every class that could be chosen, by number.
    """

    index: np.ndarray
    results: tuple[ClassResult, ...]


def pixels_of(run: Run, picture: PIL.Image.Image, size: int) -> Tensor:
    """[1, 3, h, w]: the whole picture with a short side of `size`, see `Options`."""
    factor = min(size / min(picture.size), _LONGEST * size / max(picture.size))
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return run.transform.whole(picture, width, height)[None].to(run.device)


@torch.no_grad()
def segment(
    run: Run, system: GroupViT, picture: PIL.Image.Image, classes: Classes, options: Options
) -> Segmented:
    """Segment a picture of any size.

    The scores are resized bilinearly to the picture's own size, and each pixel takes its best class.

    Args:
        run: whose preprocessing it is.
        system: of the run.
        picture: RGB.
        classes: to choose from.
        options: how it is looked at.

    Raises:
        ValueError: an option out of range, see `GroupViT.segment`.
    """
    pixels = pixels_of(run, picture, options.size)
    found = system.segment(
        pixels,
        classes.vectors,
        mode=options.mode,
        top_k=options.top_k,
        background_threshold=options.threshold,
        window=options.window,
        stride=options.stride,
    )
    scores = found.scores[0].float()
    if found.background is not None:
        scores = torch.cat([found.background.float(), scores])
    # without a background the numbers begin at 1
    first = 0 if classes.background is not None else 1
    best, place = largest(scores, (picture.height, picture.width))
    best, index = best.cpu(), (place + first).to(torch.uint8).cpu()
    cosines = (system.encode_image(pixels).global_[0] @ classes.vectors.T).tolist()
    without_text = 0 if classes.background == "text" else 1
    results = []
    for number in range(first, len(classes.names)):
        own = index == number
        share = float(own.double().mean())
        if number < without_text:
            results.append(ClassResult(classes.names[0], 0, share, None, None, None))
            continue
        results.append(
            ClassResult(
                classes.names[number],
                number,
                share,
                float(best[own].mean()) if own.any() else None,
                float(scores[number - first].max()),
                cosines[number - without_text],
            )
        )
    return Segmented(index.numpy(), tuple(results))


def largest(scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The largest of [C, h, w] at each pixel of (H, W), resized bilinearly, and its place, the first of equals.

    Class by class, since all scores of a large picture at its own size need not fit into memory.

    Returns:
        [H, W], and int64 [H, W].
    """
    best = scores.new_full(size, -torch.inf)
    place = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for number, of_class in enumerate(scores):
        if of_class.shape != size:
            of_class = F.interpolate(of_class[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        better = of_class > best
        best, place = torch.where(better, of_class, best), place.masked_fill(better, number)
    return best, place
