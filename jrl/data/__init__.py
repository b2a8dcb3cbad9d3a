"""Pictures with captions: readers behind one `Sample`, transforms, and datasets of tensors."""

from __future__ import annotations

from jrl.data.dataset import CaptionDataset, RetrievalView, collate, drop_unreadable
from jrl.data.images import Augment, ImageError, ImageTransform, load_image, save_image
from jrl.data.readers import FORMATS, FormatError, UnsafeTarError, read
from jrl.data.readers.streaming import StreamingCaptionDataset
from jrl.data.sample import Phrase, Sample, SampleSet, SceneObject, SkipReport, TimedWord

__all__ = [
    "FORMATS",
    "Augment",
    "CaptionDataset",
    "FormatError",
    "ImageError",
    "ImageTransform",
    "Phrase",
    "RetrievalView",
    "Sample",
    "SampleSet",
    "SceneObject",
    "SkipReport",
    "StreamingCaptionDataset",
    "TimedWord",
    "UnsafeTarError",
    "collate",
    "drop_unreadable",
    "load_image",
    "read",
    "save_image",
]
