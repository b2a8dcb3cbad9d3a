"""Encoders: adapters around transformers models, projection heads and their layers."""

from __future__ import annotations

from jrl.encoders.image import ImageEncoder
from jrl.encoders.layers import GridTokens, encode_grids, encode_words, layer_width
from jrl.encoders.output import EncoderOutput
from jrl.encoders.projection import ProjectionHead
from jrl.encoders.text import TextEncoder
from jrl.encoders.word_regions import WordRegions

__all__ = [
    "EncoderOutput",
    "GridTokens",
    "ImageEncoder",
    "ProjectionHead",
    "TextEncoder",
    "WordRegions",
    "encode_grids",
    "encode_words",
    "layer_width",
]
