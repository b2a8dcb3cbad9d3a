"""COCO-Object: the class of every pixel from the instance masks of COCO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jrl.data.readers.coco import CocoMask, Instances, is_image, nested_name
from jrl.data.readers.common import BAD_ROW, DistinctKeys, ImageFolder, existing_file, existing_folder
from jrl.data.readers.masks import BACKGROUND, IGNORED, SegmentationSet
from jrl.data.sample import Sample, SampleSet, SkipReport


def read_coco_object(root: str | Path, *, split: str = "val2017") -> SegmentationSet:
    """Read `annotations/instances_SPLIT.json` and the pictures in `SPLIT`, `images/SPLIT` or the folder itself.

    The classes are the file's categories by their ids (80 in COCO) behind the background. Where objects overlap the smaller one
    lies on top; a crowd's region counts nowhere (255). A picture without an object is background.

    The published evaluation takes the pixel maps of COCO-Stuff instead, which are drawn from the same instances.

    Args:
        root: folder of the dataset.
        split: "val2017", "train2017" and the like.

    Raises:
        FileNotFoundError: the annotations or the pictures are missing.
        FormatError: the file is not of this format.
        ValueError: it has too many categories, or none of its pictures is there.
    """
    root = existing_folder(root, "root")
    path = existing_file(root / "annotations" / f"instances_{split}.json", "root")
    places = (root / split, root / "images" / split, root)
    pictures, skips = ImageFolder(next(place for place in places if place.is_dir())), SkipReport()
    keys = DistinctKeys(skips)
    instances = Instances(path, skips)
    names = tuple(instances.names[number] for number in sorted(instances.names, key=_by_number))
    if len(names) >= IGNORED or len(set(names)) != len(names):
        raise ValueError(f"{path}: expected fewer than {IGNORED} categories, each with a name of its own")
    numbers = {name: number for number, name in enumerate(names, start=1)}
    samples = []
    for position, image in enumerate(instances.document["images"]):
        if not is_image(image):
            skips.add(BAD_ROW, f"{path}: images[{position}] needs 'id' and 'file_name'")
            continue
        name, where = image["file_name"], f"{path}: image {image['id']}"
        found = pictures.find_or_skip(skips, where, name, *nested_name(image))
        if found is None:
            continue
        sample = Sample(key=keys(name), image=found, captions=[], split=split)
        instances.attach(sample, image)
        sample.mask = _class_mask(sample, image, numbers)
        # the mask no longer tells the objects apart
        sample.objects = []
        samples.append(sample)
    skips.raise_if_empty(len(samples), path)
    return SegmentationSet(SampleSet(samples, name=f"COCO-Object/{split}", skips=skips), (BACKGROUND, *names))


class _ClassMask:
    def __init__(self, objects: CocoMask, ignored: CocoMask) -> None:
        self.objects, self.ignored = objects, ignored

    def __call__(self) -> np.ndarray:
        objects = self.objects()
        return np.where(objects > 0, objects, self.ignored()).astype(np.uint8)


def _class_mask(sample: Sample, image: dict[str, Any], numbers: dict[str, int]) -> _ClassMask:
    shapes = dict(sample.mask.shapes) if isinstance(sample.mask, CocoMask) else {}
    objects, ignored = [], []
    for thing in sample.objects:
        if thing.mask_id is None:
            continue
        segmentation = shapes[thing.mask_id]
        # a category that is none of the file's has its id for a label
        if "crowd" in thing.attributes or thing.label not in numbers:
            ignored.append((IGNORED, segmentation))
        else:
            objects.append((numbers[thing.label], segmentation))
    size = image.get("height"), image.get("width")
    return _ClassMask(CocoMask(*size, objects, sample.key), CocoMask(*size, ignored, sample.key))


def _by_number(number: Any) -> tuple[bool, Any]:
    return isinstance(number, str), number
