"""Pascal Context: 59 classes of objects and stuff, and the background."""

from __future__ import annotations

from pathlib import Path

from jrl.data.readers.masks import BACKGROUND, SegmentationSet, read_pascal

# In the order of the numbers that the usual conversion gives: that of the labels among the 459 of the full set. The names are
# those of GroupViT's evaluation: "airplane", "plant" and "monitor" for "aeroplane", "pottedplant" and "tvmonitor".
_NAMES = """
    airplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling chair cloth computer
    cow cup curtain dog door fence floor flower food grass ground horse keyboard light motorbike mountain mouse person plate
    platform plant road rock sheep shelves sidewalk sign sky snow sofa table track train tree truck monitor wall water window
    wood
"""
CLASSES = (BACKGROUND, *_NAMES.split())


def read_pascal_context(root: str | Path, *, split: str = "val") -> SegmentationSet:
    """Read `JPEGImages`, `SegmentationClassContext` and `ImageSets/SegmentationContext`, as mmsegmentation converts them.

    Masks hold 0 for the background and 1 to 59.

    Args:
        root: `VOC2010`, or a folder that holds it or `VOCdevkit/VOC2010`.
        split: "train" or "val".

    Raises:
        FileNotFoundError: there is no such list, or a folder is missing.
        ValueError: none of the pictures is there.
    """
    return read_pascal(root, "VOC2010", "SegmentationContext", "SegmentationClassContext", split, CLASSES)
