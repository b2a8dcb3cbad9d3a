"""Readers of the formats in use, each returning a SampleSet, and `read`, which finds one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jrl.data.readers.coco import read_coco, read_karpathy
from jrl.data.readers.coco_object import read_coco_object
from jrl.data.readers.common import FormatError
from jrl.data.readers.folder import read_folder
from jrl.data.readers.masks import SegmentationSet
from jrl.data.readers.narratives import read_localized_narratives
from jrl.data.readers.parts import read_files
from jrl.data.readers.pascal_context import read_pascal_context
from jrl.data.readers.shards import UnsafeTarError, expand_shards, read_webdataset
from jrl.data.readers.tables import read_cc3m, read_cc12m, read_csv, read_flickr30k
from jrl.data.readers.voc import read_voc
from jrl.data.sample import SampleSet

FORMATS: dict[str, Callable[..., SampleSet]] = {
    "coco": read_coco,
    "karpathy": read_karpathy,
    "flickr30k": read_flickr30k,
    "cc3m": read_cc3m,
    "cc12m": read_cc12m,
    "csv": read_csv,
    "webdataset": read_webdataset,
    "localized_narratives": read_localized_narratives,
    "folder": read_folder,
}

# pictures with the class of every pixel: each takes a root and, by keyword, the name of a split
SEGMENTATION_FORMATS: dict[str, Callable[..., SegmentationSet]] = {
    "voc": read_voc,
    "context": read_pascal_context,
    "coco": read_coco_object,
}


def read(format: str, /, **arguments: Any) -> SampleSet:
    """Read a dataset by the name of its format; `arguments` are those of its reader.

    Where `annotations` names the parts, as in `{train: FILE, val: FILE}`, each is read as one (`read_files`).

    Args:
        format: a key of `FORMATS`.
    Raises:
        ValueError: the format is unknown; the message lists those that are. The parts do not fit.
        TypeError: an argument that the reader does not take.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(sorted(FORMATS))}, got {format!r}")
    return read_files(FORMATS[format], **arguments)


__all__ = [
    "FORMATS",
    "SEGMENTATION_FORMATS",
    "FormatError",
    "SegmentationSet",
    "UnsafeTarError",
    "expand_shards",
    "read",
    "read_cc3m",
    "read_cc12m",
    "read_coco",
    "read_coco_object",
    "read_csv",
    "read_files",
    "read_flickr30k",
    "read_folder",
    "read_karpathy",
    "read_localized_narratives",
    "read_pascal_context",
    "read_voc",
    "read_webdataset",
]
