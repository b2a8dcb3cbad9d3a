"""What the readers of segmentation datasets share: pictures whose masks hold classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from jrl.data.readers.common import DistinctKeys, ImageFolder, existing_folder, text_lines
from jrl.data.sample import Sample, SampleSet, SkipReport

BACKGROUND = "background"
IGNORED = 255
MASK_MISSING = "mask file missing"


@dataclass(frozen=True)
class SegmentationSet:
    """Pictures with the class of every pixel.

    Attributes:
        samples: their masks are uint8 [H, W]: a place in `classes`, or 255 where a pixel counts nowhere. They have no
            captions.
        classes: names; the first is "background".
    """

    samples: SampleSet
    classes: tuple[str, ...]


class ClassMask:
    """Reads an indexed or grey picture of classes.

    Args:
        path: of the picture.
        classes: how many there are.
    """

    def __init__(self, path: Path, classes: int) -> None:
        self.path, self.classes = path, classes

    def __call__(self) -> np.ndarray:
        """uint8 [H, W].

        Raises:
            ValueError: it is unreadable, in colour, or holds a value that is no class.
        """
        try:
            with PIL.Image.open(self.path) as picture:
                mode, mask = picture.mode, np.array(picture)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{self.path}: cannot read the mask: {error}") from error
        if mode not in ("P", "L"):
            raise ValueError(
                f"{self.path}: expected a mask of class numbers (an indexed or grey picture), got mode {mode}"
            )
        wrong = mask[(mask >= self.classes) & (mask != IGNORED)]
        if wrong.size:
            raise ValueError(
                f"{self.path}: expected classes below {self.classes} or {IGNORED}, got {wrong.flat[0]}"
            )
        return mask


def read_pascal(
    root: str | Path, folder: str, lists: str, masks: str, split: str, classes: Sequence[str]
) -> SegmentationSet:
    """Read `JPEGImages/NAME.jpg` with `MASKS/NAME.png` for the names in `ImageSets/LISTS/SPLIT.txt`.

    Args:
        root: the folder that holds those three, or one above it.
        folder: what it is called in the devkit, such as "VOC2012".
        lists: folder of the lists below `ImageSets`.
        masks: folder of the masks.
        split: name of the list.
        classes: the background first.

    Raises:
        FileNotFoundError: there is no such list below `root`, or a folder is missing.
        ValueError: none of its pictures is there.
    """
    root = existing_folder(root, "root")
    places = (root, root / folder, root / "VOCdevkit" / folder)
    listed = Path("ImageSets", lists, f"{split}.txt")
    found = next((place for place in places if (place / listed).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"root: {root} holds no {listed}, neither itself nor in {folder} or VOCdevkit/{folder}"
        )
    skips = SkipReport()
    pictures, truths = ImageFolder(found / "JPEGImages"), ImageFolder(found / masks)
    keys = DistinctKeys(skips)
    samples = []
    for number, line in text_lines(found / listed, skips):
        name, where = line.strip(), f"{found / listed}:{number}"
        picture = pictures.find_or_skip(skips, where, f"{name}.jpg")
        if picture is None:
            continue
        truth = truths.find(f"{name}.png")
        if truth is None:
            skips.add(MASK_MISSING, f"{where}: {truths.root / name}.png")
            continue
        samples.append(
            Sample(
                key=keys(name), image=picture, captions=[], split=split, mask=ClassMask(truth, len(classes))
            )
        )
    skips.raise_if_empty(len(samples), found / listed)
    return SegmentationSet(SampleSet(samples, name=f"{folder}/{split}", skips=skips), tuple(classes))
