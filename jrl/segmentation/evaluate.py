"""Mean intersection over union of a run on a dataset with the class of every pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import PIL.Image
import torch

from jrl.data.images import ImageError, load_image
from jrl.data.readers.masks import SegmentationSet
from jrl.data.sample import Sample, SkipReport
from jrl.evaluation.segmentation import SegmentationScore
from jrl.segmentation.classes import Classes
from jrl.segmentation.segment import Options, Segmented, segment
from jrl.systems import GroupViT
from jrl.training.run import Run

_SAY_EVERY = 100


@dataclass(frozen=True)
class Protocol:
    """What the published evaluation does with a dataset, in multiples of the side that the system was trained with.

    Attributes:
        threshold: score below which a pixel is background.
        size: short side of a picture, and of the windows.
        stride: from one window to the next.
    """

    threshold: float
    size: int = 2
    stride: int = 1


# Xu et al. 2022: windows of 448 every 224 pixels, for a system trained at 224
PROTOCOLS = {"voc": Protocol(0.95), "context": Protocol(0.35), "coco": Protocol(0.95)}


@dataclass
class Score:
    """What a run reaches on a dataset.

    Attributes:
        names: of the classes.
        class_iou: of each class; None for one that occurs neither in truth nor in prediction.
        values: see `SegmentationScore.compute`.
        pictures: how many were scored.
        skips: those that could not be read.
    """

    names: tuple[str, ...]
    class_iou: list[float | None]
    values: dict[str, float]
    pictures: int
    skips: SkipReport = field(default_factory=SkipReport)


def evaluate(
    run: Run,
    system: GroupViT,
    data: SegmentationSet,
    classes: Classes,
    options: Options,
    *,
    limit: int | None = None,
    watch: Callable[[int, Sample, PIL.Image.Image, Segmented], None] = lambda *_: None,
    say: Callable[[str], None] = lambda text: None,
) -> Score:
    """Segment the pictures of a dataset at their own size and score them.

    Args:
        run: whose preprocessing it is.
        system: of the run.
        data: pictures and masks.
        classes: as many as the dataset has, in its order; their names may be others.
        options: how pictures are looked at.
        limit: score the first so many pictures; None for all.
        watch: given each picture that was scored, by its number, with its sample and its segmentation.
        say: told how far it is.

    Raises:
        ValueError: another number of classes, a mask that cannot be read or has another size than its picture, or no picture.
    """
    if len(classes.names) != len(data.classes):
        raise ValueError(
            f"classes: expected {len(data.classes) - 1} besides the background, got {len(classes.names) - 1}"
        )
    score, skips, done = SegmentationScore(len(data.classes)), SkipReport(), 0
    samples = data.samples[:limit]
    for number, sample in enumerate(samples, start=1):
        try:
            picture = load_image(sample.image, name=sample.key)
        except ImageError as error:
            skips.add(error.reason, str(error))
            continue
        truth = sample.load_mask()
        assert truth is not None
        found = segment(run, system, picture, classes, options)
        if found.index.shape != truth.shape:
            raise ValueError(
                f"sample {sample.key!r}: its mask is {list(truth.shape)}, its picture {list(found.index.shape)}"
            )
        score.update(torch.from_numpy(found.index), torch.from_numpy(truth))
        watch(done, sample, picture, found)
        done += 1
        if number % _SAY_EVERY == 0:
            say(
                f"{number} of {len(samples)} pictures: mean IoU {100 * score.compute()['mean_iou']:.1f} % so far"
            )
    skips.raise_if_empty(done, "pictures")
    iou = [None if value != value else value for value in score.class_iou().tolist()]
    return Score(data.classes, iou, score.compute(), done, skips)
