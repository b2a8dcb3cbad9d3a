"""Pascal VOC 2012: twenty classes of objects and the background."""

from __future__ import annotations

from pathlib import Path

from jrl.data.readers.masks import BACKGROUND, SegmentationSet, read_pascal

# as GroupViT's evaluation writes them: "table", "plant" and "monitor" are "diningtable", "pottedplant" and "tvmonitor" in VOC
_NAMES = """
    aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep sofa train monitor
"""
CLASSES = (BACKGROUND, *_NAMES.split())


def read_voc(root: str | Path, *, split: str = "val") -> SegmentationSet:
    """Read `JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation`; borders of objects are 255, which counts nowhere.

    Args:
        root: `VOC2012`, or a folder that holds it or `VOCdevkit/VOC2012`.
        split: "train", "val" or "trainval".

    Raises:
        FileNotFoundError: there is no such list, or a folder is missing.
        ValueError: none of the pictures is there.
    """
    return read_pascal(root, "VOC2012", "Segmentation", "SegmentationClass", split, CLASSES)
