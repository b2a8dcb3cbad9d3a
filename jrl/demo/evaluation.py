"""The trained system on its test parts: retrieval, zero-shot classes, and the pictures of the report's grid."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jrl.data.sample import Sample, SkipReport
from jrl.demo.questions import QUERIES, TEST_PARTS, classifications
from jrl.evaluation import (
    chance_recall,
    evaluate,
    retrieval_metrics,
    retrieval_ranks,
    zero_shot_accuracy,
)
from jrl.training.captions import with_captions
from jrl.training.data import CaptionDataModule
from jrl.training.run import Run

# Stated for the emoji before the demo was written: recall at k, both ways.
BARS = {"test_compositional": ("r1", 0.85), "test_unseen": ("r10", 0.30)}
_SHOWN = 5
_DRAWN = {0: 6, 1: 4}  # queries of the grid from the first and the second test part


@dataclass
class Query:
    """One row of the grid.

    Attributes:
        text: the query.
        part: test part that it comes from and that is searched; None for free words, over all pictures.
        found: keys of the best pictures.
        right: key of its own picture; None for free words.
        rank: of its own picture, from 1; None for free words.
    """

    text: str
    part: str | None
    found: list[str]
    right: str | None = None
    rank: int | None = None


@dataclass
class _Embedded:
    samples: list[Sample]
    image: Tensor
    text: Tensor
    caption_image: Tensor
    captions: list[str]

    def part(self, name: str) -> _Embedded:
        chosen = [i for i, sample in enumerate(self.samples) if sample.split == name]
        position = torch.full((len(self.samples),), -1)
        position[chosen] = torch.arange(len(chosen))
        rows = (position[self.caption_image] >= 0).nonzero()[:, 0]
        return _Embedded(
            [self.samples[i] for i in chosen],
            self.image[chosen],
            self.text[rows],
            position[self.caption_image[rows]],
            [self.captions[row] for row in rows.tolist()],
        )


def evaluate_run(folder: Path, source: CaptionDataModule, device: str = "cpu") -> dict[str, Any]:
    """Everything that the report says of the trained system.

    Args:
        folder: of the run.
        source: its pictures, "emoji" or "scenes", read.
        device: where to embed.

    Returns:
        "retrieval" and "among_all": results by test part; "bars"; "zero_shot"; "queries" of the grid;
        "pictures": how many each part has; "skipped": the account of what the dataset left out.

    Raises:
        FileNotFoundError, ValueError: the run is incomplete or unreadable.
    """
    run = Run.load(folder, device=device)
    data = source.dataset
    embedded, skips = _embed(run, source)
    parts = {name: embedded.part(name) for name in TEST_PARTS[data]}
    system: Any = run.system
    scale = system.objective.scale.item()
    retrieval = {
        name: evaluate(part.image, part.text, part.caption_image, scale=scale) for name, part in parts.items()
    }
    for name, part in parts.items():
        retrieval[name].update(_chances(part))
    counts: dict[str, int] = {}
    for sample in embedded.samples:
        counts[str(sample.split)] = counts.get(str(sample.split), 0) + 1
    return {
        "retrieval": retrieval,
        "among_all": _among_all(embedded, list(parts)),
        "bars": _bars(retrieval) if data == "emoji" else [],
        "zero_shot": _zero_shot(run, data, list(parts.values())),
        "queries": [asdict(query) for query in _queries(run, data, embedded, parts)],
        "pictures": counts,
        "skipped": skips.summary(),
    }


def _embed(run: Run, data: CaptionDataModule) -> tuple[_Embedded, SkipReport]:
    everything = [sample for part in data.parts for sample in data.samples(part)]
    skips = SkipReport()
    skips.merge(data.skips)
    samples, captions = with_captions(everything, data.eval_languages, skips)
    image, kept, unreadable = run.encode_images([(sample.key, sample.image) for sample in samples])
    skips.merge(unreadable)
    flat = [caption for i in kept for caption in captions[i]]
    owners = [row for row, i in enumerate(kept) for _ in captions[i]]
    return (
        _Embedded([samples[i] for i in kept], image, run.encode_texts(flat), torch.tensor(owners), flat),
        skips,
    )


def _chances(part: _Embedded) -> dict[str, float]:
    pictures, captions = len(part.image), len(part.text)
    found = {}
    for k in (1, 5, 10):
        # exact when every picture has as many captions as the others
        found[f"i2t_chance_r{k}"] = chance_recall(k, captions, max(1, round(captions / pictures)))
        found[f"t2i_chance_r{k}"] = chance_recall(k, pictures)
    return found


def _among_all(embedded: _Embedded, parts: Sequence[str]) -> dict[str, dict[str, float]]:
    ranks = retrieval_ranks(embedded.image, embedded.text, embedded.caption_image)
    splits = [sample.split for sample in embedded.samples]
    result = {}
    for name in parts:
        pictures = torch.tensor([split == name for split in splits])
        found = {"candidates": float(len(splits))}
        for direction, values in (
            ("i2t", ranks.image_to_text[pictures]),
            ("t2i", ranks.text_to_image[pictures[embedded.caption_image]]),
        ):
            found.update({f"{direction}_{key}": value for key, value in retrieval_metrics(values).items()})
        result[name] = found
    return result


def _bars(retrieval: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "part": part,
            "direction": direction,
            "metric": metric,
            "bar": bar,
            "value": value,
            "met": value >= bar,
        }
        for part, (metric, bar) in BARS.items()
        for direction in ("i2t", "t2i")
        for value in [retrieval[part][f"{direction}_{metric}"]]
    ]


def _zero_shot(run: Run, data: str, parts: Sequence[_Embedded]) -> list[dict[str, Any]]:
    results = []
    system: Any = run.system
    for task in classifications(data):
        labelled = [
            (task.classes.index(label), part.image[row])
            for part in parts
            for row, sample in enumerate(part.samples)
            for label in [task.label(sample)]
            if label is not None
        ]
        if not labelled:
            continue
        classifier = system.zero_shot_classifier(task.classes, task.templates, run.tokenizer)
        labels = torch.tensor([label for label, _ in labelled])
        image = torch.stack([vector for _, vector in labelled])
        accuracy = zero_shot_accuracy(image, classifier.cpu(), labels, ks=(1,))["top1"]
        results.append(
            {
                "task": task.name,
                "classes": len(task.classes),
                "pictures": len(labelled),
                "accuracy": accuracy,
                "commonest": int(labels.bincount().max()) / len(labels),
                "templates": list(task.templates),
            }
        )
    return results


def _queries(run: Run, data: str, embedded: _Embedded, parts: dict[str, _Embedded]) -> list[Query]:
    queries = []
    for number, (name, part) in enumerate(parts.items()):
        # drawn, so that nobody chose the ones that went well
        rows = random.Random(0).sample(range(len(part.text)), min(_DRAWN[number], len(part.text)))
        ranks = retrieval_ranks(part.image, part.text, part.caption_image).text_to_image
        for row in rows:
            found = (part.image @ part.text[row]).topk(min(_SHOWN, len(part.image))).indices.tolist()
            right = part.samples[int(part.caption_image[row])].key
            keys = [part.samples[i].key for i in found]
            queries.append(Query(part.captions[row], name, keys, right, int(ranks[row]) + 1))
    scores = run.encode_texts(QUERIES[data]) @ embedded.image.T
    best = scores.topk(min(_SHOWN, len(embedded.image))).indices.tolist()
    for text, row_best in zip(QUERIES[data], best, strict=True):
        queries.append(Query(text, None, [embedded.samples[i].key for i in row_best]))
    return queries
