"""Encoders: adapters around transformers models, and projection heads."""

from __future__ import annotations

from jrl.encoders.image import ImageEncoder
from jrl.encoders.output import EncoderOutput
from jrl.encoders.projection import ProjectionHead
from jrl.encoders.text import TextEncoder
from jrl.encoders.word_regions import WordRegions

__all__ = ["EncoderOutput", "ImageEncoder", "ProjectionHead", "TextEncoder", "WordRegions"]
