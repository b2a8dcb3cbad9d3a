"""A sentence about a picture, written by a small decoder that looks at the encoder's tokens."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn
from torchmetrics.functional.text import bleu_score

from jrl.data.sample import Sample
from jrl.data.scenes_drawing import COLOURS, SHAPES
from jrl.downstream.features import Features, MapTokens
from jrl.downstream.task import Recipe, Task, Values
from jrl.downstream.words import Words

_PAIR = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


class Decoder(nn.Module):
    """A causal transformer over words that attends to the tokens of the picture.

    Args:
        in_channels: W of the map.
        words: size of the vocabulary.
        longest: tokens of the longest text.
        width, layers: of the transformer.
    """

    def __init__(self, in_channels: int, words: int, longest: int, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.tokens = MapTokens(in_channels, width)
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.1 * torch.randn(longest, width))
        layer = nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.output = nn.Linear(width, words)
        nn.init.normal_(self.words.weight, std=0.5)

    def forward(self, map_: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, T, words] of the word after each of ids [B, T]."""
        return self.read(self.tokens(map_), ids)

    def read(self, memory: Tensor, ids: Tensor) -> Tensor:
        """The same from the projected tokens [B, h·w, width]."""
        length = ids.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        said = self.words(ids) + self.places[:length]
        return self.output(self.layers(said, memory, tgt_mask=later, tgt_is_causal=True))

    def write(self, map_: Tensor, start: int, end: int) -> Tensor:
        """The likeliest word after word: ids [B, T], from `start`, until all rows have said `end`."""
        memory = self.tokens(map_)
        ids = torch.full((len(map_), 1), start, device=map_.device)
        finished = torch.zeros(len(map_), dtype=torch.bool, device=map_.device)
        while ids.shape[1] < len(self.places) and not bool(finished.all()):
            word = self.read(memory, ids)[:, -1].argmax(dim=1).masked_fill(finished, end)
            ids, finished = torch.cat([ids, word[:, None]], dim=1), finished | (word == end)
        return F.pad(ids, (0, len(self.places) - ids.shape[1]), value=end)


class Captioning(Task):
    """The sentence that lists the shapes. Cross-entropy of the next word; BLEU-4 and the pairs of colour and shape."""

    name = "captioning"
    metric = "pairs_f1"
    recipe = Recipe(epochs=30, lr=2e-3)

    def __init__(self, width: int = 128) -> None:
        self.width = width

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Train a tokenizer on the captions, and take the length of the longest."""
        captions = [sample.captions[0] for sample in samples]
        self.words = Words(captions)
        self.longest = self.words.ids(captions).shape[1]

    def examples(self, samples: Sequence[Sample]) -> Values:
        """ "ids" [E, T] int64 of the first caption of each scene; "pairs" [E, colours, shapes] int64 of its objects."""
        ids = self.words.ids([sample.captions[0] for sample in samples])[:, : self.longest]
        ids = F.pad(ids, (0, self.longest - ids.shape[1]), value=self.words.pad)
        texts = ["; ".join(" ".join((*t.attributes, t.label)) for t in sample.objects) for sample in samples]
        return {"image": torch.arange(len(samples)), "ids": ids, "pairs": count_pairs(texts)}

    def head(self, global_width: int, token_width: int) -> nn.Module:
        """A decoder."""
        return Decoder(token_width, len(self.words), self.longest, self.width)

    def loss(self, head: nn.Module, features: Features, batch: Values) -> Tensor:
        """Cross-entropy of each next word, mean over the words of the batch."""
        ids = batch["ids"]
        logits = head(features.map, ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=self.words.pad)

    def predict(self, head: nn.Module, features: Features, batch: Values) -> Values:
        """ "ids" [B, T] of the likeliest words."""
        assert isinstance(head, Decoder)
        return {"ids": head.write(features.map, self.words.start, self.words.end)}

    def baseline(self, train: Values, test: Values) -> Values:
        """The commonest training caption for every picture."""
        rows, counts = train["ids"].unique(dim=0, return_counts=True)
        return {"ids": rows[counts.argmax()].expand(len(test["ids"]), -1)}

    def score(self, predictions: Values, examples: Values) -> dict[str, float]:
        """BLEU-4 of the whole set; F1 of the pairs said; share of the pictures whose pairs are exactly right."""
        said, true = self.words.texts(predictions["ids"]), self.words.texts(examples["ids"])
        counted, pairs = count_pairs(said), examples["pairs"]
        right = torch.minimum(counted, pairs).sum()
        return {
            self.metric: float(2 * right / (counted.sum() + pairs.sum()).clamp(min=1)),
            "pairs_exact": float((counted == pairs).flatten(1).all(dim=1).double().mean()),
            "bleu4": float(bleu_score(said, [[text] for text in true])),
        }

    def draw(self, axes: Axes, picture: np.ndarray, predictions: Values, examples: Values, row: int) -> None:
        """The picture over its caption and the one written."""
        axes.imshow(picture)
        texts = [self.words.texts(values["ids"][row : row + 1])[0] for values in (examples, predictions)]
        lines = [
            textwrap.fill(f"{title}: {text}", 44)
            for title, text in zip(("truth", "said"), texts, strict=True)
        ]
        axes.set_xlabel("\n".join(lines), fontsize=6)


def count_pairs(texts: Sequence[str]) -> Tensor:
    """How often each colour stands before each shape: [len(texts), colours, shapes] int64."""
    colours, shapes = tuple(COLOURS), tuple(SHAPES)
    counts = torch.zeros(len(texts), len(colours), len(shapes), dtype=torch.int64)
    for row, text in enumerate(texts):
        for (colour, shape), count in Counter(_PAIR.findall(text)).items():
            counts[row, colours.index(colour), shapes.index(shape)] = count
    return counts
