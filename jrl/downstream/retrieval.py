"""Captions and pictures that find each other: the system as it is, without a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jrl.downstream.features import encode_part
from jrl.downstream.scenes import ScenePart
from jrl.evaluation import chance_recall, evaluate
from jrl.training.run import Run

_KS = (1, 5, 10)
_SHOWN = 5


@dataclass
class Retrieval:
    """Retrieval on a part.

    Attributes:
        scores: recall at 1, 5 and 10 from image to text and back, and the mean of the six.
        baseline: the same for a random order.
        captions: one of each picture.
        found: [N, k] int64, the pictures that fit each caption best, best first.
    """

    scores: dict[str, float]
    baseline: dict[str, float]
    captions: list[str]
    found: Tensor


def retrieval(run: Run, part: ScenePart) -> Retrieval:
    """How well pictures and the captions that list their shapes find each other.

    Another picture with the very same caption counts as wrong, as does every tie.

    Args:
        run: the system and its tokenizer.
        part: pictures and captions.

    Raises:
        ValueError: the two embeddings differ in width.
    """
    captions = [sample.captions[0] for sample in part.samples]
    text = run.encode_texts(captions)
    image = encode_part(run.system, part, run.device).global_
    found = evaluate(image, text)
    names = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in _KS]
    scores = {"mean_recall": found["mean_recall"], **{name: found[name] for name in names}}
    chances = [chance_recall(k, len(part)) for k in _KS] * 2
    baseline = {"mean_recall": sum(chances) / 6, **dict(zip(names, chances, strict=True))}
    order = (text @ image.T).topk(min(_SHOWN, len(part)), dim=1).indices
    return Retrieval(scores, baseline, captions, torch.as_tensor(order))
