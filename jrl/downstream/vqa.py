"""Answers to questions about a picture: the words of the question attend to the encoder's tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

from jrl.data.sample import Sample
from jrl.downstream.features import Features, MapTokens
from jrl.downstream.questions import KINDS, ask
from jrl.downstream.task import Recipe, Task, Values
from jrl.downstream.words import Words


class Answerer(nn.Module):
    """Words that attend to one another and to the tokens of the picture; the first of them answers.

    Args:
        in_channels: W of the map.
        words: size of the vocabulary of the questions.
        answers: how many there are to choose from.
        padding: id of the padding.
        longest: tokens of the longest question.
        width, layers: of the transformer.
    """

    def __init__(
        self,
        in_channels: int,
        words: int,
        answers: int,
        padding: int,
        longest: int,
        width: int = 128,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.tokens = MapTokens(in_channels, width)
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.1 * torch.randn(longest, width))
        layer = nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.output = nn.Linear(width, answers)
        nn.init.normal_(self.words.weight, std=0.5)

    def forward(self, map_: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, answers] for questions ids [B, T]."""
        asked = self.words(ids) + self.places[: ids.shape[1]]
        read = self.layers(asked, self.tokens(map_), tgt_key_padding_mask=ids == self.padding)
        return self.output(read[:, 0])


class VisualQuestions(Task):
    """How many, which colour, is there, where. Cross-entropy over the answers; accuracy for each kind of question."""

    name = "vqa"
    metric = "accuracy"
    recipe = Recipe(epochs=20, lr=2e-3, batch_size=64)

    def __init__(self, width: int = 128) -> None:
        self.width = width

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Train a tokenizer on the questions, and take the answers that occur and the longest question."""
        questions = [question for sample in samples for question in ask(sample)]
        self.words = Words([question.text for question in questions])
        self.longest = self.words.ids([question.text for question in questions]).shape[1]
        self.answers = sorted({question.answer for question in questions})

    def examples(self, samples: Sequence[Sample]) -> Values:
        """One row a question: "ids" [E, T], "answer" [E] (−1 for one that training lacks), "kind" [E], all int64."""
        asked = [(row, question) for row, sample in enumerate(samples) for question in ask(sample)]
        ids = self.words.ids([question.text for _, question in asked])[:, : self.longest]
        known = {answer: place for place, answer in enumerate(self.answers)}
        return {
            "image": torch.tensor([row for row, _ in asked]),
            "ids": F.pad(ids, (0, self.longest - ids.shape[1]), value=self.words.pad),
            "answer": torch.tensor([known.get(question.answer, -1) for _, question in asked]),
            "kind": torch.tensor([KINDS.index(question.kind) for _, question in asked]),
        }

    def head(self, global_width: int, token_width: int) -> nn.Module:
        """An answerer."""
        return Answerer(
            token_width, len(self.words), len(self.answers), self.words.pad, self.longest, self.width
        )

    def loss(self, head: nn.Module, features: Features, batch: Values) -> Tensor:
        """Cross-entropy, mean over the questions with a known answer."""
        logits, answer = head(features.map, batch["ids"]), batch["answer"]
        total = F.cross_entropy(logits, answer, ignore_index=-1, reduction="sum")
        return total / (answer >= 0).sum().clamp(min=1)

    def predict(self, head: nn.Module, features: Features, batch: Values) -> Values:
        """ "answer" [B]."""
        return {"answer": head(features.map, batch["ids"]).argmax(dim=1)}

    def baseline(self, train: Values, test: Values) -> Values:
        """The commonest answer to the same question in training, and to that kind of question where it is new."""
        by_text: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        by_kind: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for ids, answer, kind in _questions(train):
            by_text[ids][answer] += 1
            by_kind[kind][answer] += 1
        guesses = [
            (by_text.get(ids) or by_kind[kind] or Counter([0])).most_common(1)[0][0]
            for ids, _, kind in _questions(test)
        ]
        return {"answer": torch.tensor(guesses)}

    def score(self, predictions: Values, examples: Values) -> dict[str, float]:
        """Share of right answers: over all questions, and for each kind that is asked."""
        right = (predictions["answer"] == examples["answer"]).double()
        scores = {self.metric: float(right.mean())}
        for number, kind in enumerate(KINDS):
            asked = examples["kind"] == number
            if bool(asked.any()):
                scores[kind.replace(" ", "_")] = float(right[asked].mean())
        return scores

    def draw(self, axes: Axes, picture: np.ndarray, predictions: Values, examples: Values, row: int) -> None:
        """The picture over the question, its answer and the one given."""
        axes.imshow(picture)
        true, said = (int(values["answer"][row]) for values in (examples, predictions))
        words = [self.answers[place] if place >= 0 else "an unknown answer" for place in (true, said)]
        axes.set_title(self.words.texts(examples["ids"][row : row + 1])[0] + "?", fontsize=7)
        colour = "tab:blue" if true == said else "tab:red"
        axes.set_xlabel(f"truth: {words[0]}, said: {words[1]}", fontsize=7, color=colour)


def _questions(values: Values) -> Iterator[tuple[tuple[int, ...], int, int]]:
    for ids, answer, kind in zip(*(values[name].tolist() for name in ("ids", "answer", "kind")), strict=True):
        yield tuple(ids), answer, kind
