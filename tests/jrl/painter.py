"""A GroupViT that groups patches by their colour and knows which words mean which colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.data.images import ImageTransform
from jrl.data.tokenizer import train_tokenizer
from jrl.encoders import EncoderOutput, TextEncoder
from jrl.encoders.group_vit import Grouping, GroupViTImageEncoder
from jrl.encoders.group_vit_blocks import GroupMap
from jrl.systems import GroupViT
from jrl.training.run import Run
from tests.jrl.group_vit_fixtures import IMAGE, TEXT

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (240, 240, 240)}
VOCABULARY, _WIDTH = 600, 72


class Painter(GroupViT):
    """Its groups are colours; the vector of a group is that of the word that means its colour.

    Args:
        meanings: a word for each colour.
        words: others that it knows.
    """

    def __init__(self, meanings: dict[str, tuple[int, int, int]], words: Sequence[str] = ()) -> None:
        super().__init__(
            GroupViTImageEncoder(**{**IMAGE, "width": _WIDTH, "group_tokens": (6, 4, 0)}),
            TextEncoder(TEXT, "eos"),
            _WIDTH,
        )
        sentences = [f"a photo of a {word}." for word in (*meanings, *words)]
        self.tokenizer = train_tokenizer(sentences, vocabulary_size=VOCABULARY, max_length=32)
        # words are at right angles, so a colour that no class means is like none of them
        self.vectors = dict(zip(dict.fromkeys((*meanings, *words)), torch.eye(_WIDTH), strict=False))
        self.colours = torch.tensor(list(meanings.values())) / 255
        self.groups = torch.stack([self.vectors[word] for word in meanings])
        self.image_projection = nn.Sequential()
        self.image_encoder.group = self.group  # type: ignore[method-assign]
        self.image_encoder.forward = lambda pixel_values: self.group(pixel_values).output  # type: ignore[method-assign]

    def group(self, pixel_values: Tensor) -> Grouping:
        """Six groups of patches, of which the first few are colours, then the colours."""
        down, right = (-side % 4 for side in pixel_values.shape[2:])
        cells = F.avg_pool2d(F.pad(pixel_values, (0, right, 0, down), mode="replicate") / 2 + 0.5, 4)
        distance = torch.cdist(cells.flatten(2).mT, self.colours.expand(len(cells), -1, -1))
        first = F.pad(distance, (0, 6 - len(self.colours)), value=9.0).mul(-20).softmax(dim=-1)
        second = torch.eye(6)[:, : len(self.colours)].expand(len(cells), -1, -1)
        maps = [GroupMap(soft, soft.argmax(dim=-1), soft.shape[-1]) for soft in (first, second)]
        share = (first @ second).mean(dim=1)
        tokens = self.groups.expand(len(cells), -1, -1)
        return Grouping(
            EncoderOutput((share[:, :, None] * tokens).sum(dim=1), tokens), maps, tuple(cells.shape[2:])
        )

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        rows = []
        for text in self.tokenizer.batch_decode(input_ids, skip_special_tokens=True):
            known = [vector for word, vector in self.vectors.items() if re.search(rf"\b{word}\b", text)]
            # texts without a word that it knows are one to it
            rows.append(F.normalize(sum(known, torch.full((_WIDTH,), 1e-3)), dim=0))
        return EncoderOutput(torch.stack(rows), torch.stack(rows)[:, None])


def painter_run(meanings: dict[str, Any] | None = None, words: Sequence[str] = ()) -> Run:
    """A run of it, made for pictures of 16 pixels."""
    system = Painter(COLOURS if meanings is None else meanings, words).eval()
    return Run(system, system.tokenizer, ImageTransform(16, (0.5,) * 3, (0.5,) * 3), 32)
