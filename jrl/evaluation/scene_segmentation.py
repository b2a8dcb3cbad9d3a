"""Zero-shot segmentation of generated scenes: what a system reaches, what trivial answers do, and what its groups allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.data.sample import Sample
from jrl.data.scenes_drawing import BACKGROUNDS
from jrl.evaluation.segmentation import (
    BACKGROUND,
    IGNORED,
    SegmentationScore,
    class_mask,
    scene_label,
    trivial_baselines,
)

BACKGROUND_TEXTS = tuple(f"{colour} background" for colour in BACKGROUNDS)
_BATCH = 100


class Segmenter(Protocol):
    """A system that segments by texts, such as `jrl.systems.GroupViT`."""

    def segment(self, pixel_values: Tensor, classes: Tensor, *, top_k: int | None) -> Any:
        """The scores of the classes at every pixel."""

    def group_maps(self, pixel_values: Tensor) -> Any:
        """The group of every patch."""


# Captions name the background half as often as they could, so its texts are a little too far from it; what their scores
# are multiplied by is chosen on validation scenes.
BACKGROUND_WEIGHTS = tuple(2.0**power for power in range(17))


@dataclass(frozen=True)
class Scenes:
    """Scenes and the class of every pixel.

    Attributes:
        pixels: [N, 3, H, W], normalised as the system expects.
        truth: uint8 [N, H, W]: 0 for background, i + 1 for `names[i]`.
        names: of the classes, "red circle" and so on.
    """

    pixels: Tensor
    truth: Tensor
    names: tuple[str, ...]

    @property
    def classes(self) -> int:
        """How many there are, the background included."""
        return len(self.names) + 1


def scene_names(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The pairs of colour and shape that occur, sorted."""
    return tuple(sorted({scene_label(thing) for sample in samples for thing in sample.objects}))


def labelled(samples: Sequence[Sample], pixels: Tensor, names: Sequence[str]) -> Scenes:
    """Scenes with their masks.

    Args:
        samples: of generated scenes.
        pixels: [N, 3, H, W] of the same.
        names: of the classes; an object of another is ignored.
    """
    truth = torch.stack([class_mask(sample, names, scene_label) for sample in samples])
    return Scenes(pixels, truth, tuple(names))


def class_texts(names: Sequence[str]) -> list[str]:
    """The texts whose vectors `predict` takes: three that captions use of backgrounds, then the names."""
    return [*BACKGROUND_TEXTS, *names]


def predict(
    system: Segmenter, pixels: Tensor, texts: Tensor, background_weights: Sequence[float] = (1.0,)
) -> list[Tensor]:
    """The class of every pixel: the one whose text scores best, once those of backgrounds are multiplied by a weight.

    Args:
        system: what segments.
        pixels: [N, 3, H, W].
        texts: [3 + C, D] unit vectors of `class_texts`.
        background_weights: one or more.

    Returns:
        For each weight int64 [N, H, W] in [0, C], 0 for background.
    """
    found: list[list[Tensor]] = [[] for _ in background_weights]
    for batch in pixels.split(_BATCH):
        scores = system.segment(batch, texts, top_k=None).scores
        background = scores[:, : len(BACKGROUND_TEXTS)].amax(dim=1)
        best, index = scores[:, len(BACKGROUND_TEXTS) :].max(dim=1)
        for weight, rows in zip(background_weights, found, strict=True):
            rows.append((index + 1).masked_fill(weight * background >= best, BACKGROUND))
    return [torch.cat(rows) for rows in found]


def score(prediction: Tensor, scenes: Scenes) -> dict[str, float]:
    """As `SegmentationScore.compute`."""
    scores = SegmentationScore(scenes.classes)
    scores.update(prediction.cpu(), scenes.truth)
    return scores.compute()


def choose_background(
    system: Segmenter, scenes: Scenes, texts: Tensor, weights: Sequence[float] = BACKGROUND_WEIGHTS
) -> float:
    """The weight of the background with the best mean intersection over union; the first of several."""
    reached = [score(each, scenes)["mean_iou"] for each in predict(system, scenes.pixels, texts, weights)]
    return weights[reached.index(max(reached))]


@dataclass(frozen=True)
class Groups:
    """How the groups of a system part the scenes.

    Attributes:
        pixels: int64 [N, H, W], the group of every pixel, without noise.
        used: mean number of groups of a picture that have a patch.
        largest: mean share of the patches in the largest group of a picture.
        kinds: number of groups that have a patch in any picture.
    """

    pixels: Tensor
    used: float
    largest: float
    kinds: int


def group_scenes(system: Segmenter, pixels: Tensor) -> Groups:
    """The groups of the last stage.

    Args:
        system: what groups.
        pixels: [N, 3, H, W].
    """
    maps, shares = [], []
    size = tuple(pixels.shape[2:])
    for batch in pixels.split(_BATCH):
        found = system.group_maps(batch)
        square = found.hard_product.mT.unflatten(2, found.grid)
        maps.append(F.interpolate(square, size, mode="nearest").argmax(dim=1))
        shares.append(found.hard_product.mean(dim=1))
    share = torch.cat(shares)
    return Groups(
        torch.cat(maps),
        float((share > 0).sum(dim=1).float().mean()),
        float(share.amax(dim=1).mean()),
        int((share.amax(dim=0) > 0).sum()),
    )


def name_by_truth(groups: Tensor, scenes: Scenes) -> Tensor:
    """Each group of each picture as the class that has most of its pixels: what perfect names would reach.

    Args:
        groups: int64 [N, H, W].
        scenes: the same pictures.

    Returns:
        int64 [N, H, W].
    """
    count = int(groups.max()) + 1
    group = F.one_hot(groups.flatten(1), count).float()  # [N, H · W, G]
    known = (scenes.truth != IGNORED).flatten(1)
    truth = F.one_hot(scenes.truth.long().flatten(1) * known, scenes.classes).float() * known[..., None]
    best = (group.mT @ truth).argmax(dim=-1)  # [N, G]
    return best.gather(1, groups.flatten(1)).view_as(groups)


def report(
    system: Segmenter,
    texts: Tensor,
    untrained: Segmenter,
    untrained_texts: Tensor,
    validation: Scenes,
    parts: dict[str, Scenes],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The scores of a system beside those of trivial answers; the background's weight is chosen on validation.

    Args:
        system: the trained one.
        texts: its vectors of `class_texts`.
        untrained: one of the same shape with random weights, which gets its own weight.
        untrained_texts: its vectors.
        validation: scenes to choose on.
        parts: scenes to report, by name.
        seed: of the random groups.

    Returns:
        JSON types: "background_weight", and for each part "scores" (by the kind of answer), "groups" and "times_trivial":
        the system's mean intersection over union in multiples of the best trivial answer's.
    """
    weight = choose_background(system, validation, texts)
    other = choose_background(untrained, validation, untrained_texts)
    found: dict[str, Any] = {"background_weight": weight, "parts": {}}
    for name, scenes in parts.items():
        groups = group_scenes(system, scenes.pixels)
        trivial = {
            **trivial_baselines(scenes.truth, scenes.classes, seed=seed),
            "untrained": score(predict(untrained, scenes.pixels, untrained_texts, (other,))[0], scenes),
        }
        ours = score(predict(system, scenes.pixels, texts, (weight,))[0], scenes)
        found["parts"][name] = {
            "pictures": len(scenes.pixels),
            "classes": scenes.classes,
            "scores": {
                "system": ours,
                **trivial,
                "groups_named_by_truth": score(name_by_truth(groups.pixels, scenes), scenes),
            },
            "times_trivial": ours["mean_iou"] / max(each["mean_iou"] for each in trivial.values()),
            "groups": {"used": groups.used, "largest": groups.largest, "kinds": groups.kinds},
        }
    return found


_WORDS = {
    "system": "this system",
    "single_class": "best single class everywhere",
    "random_groups": "random groups",
    "untrained": "random weights",
    "groups_named_by_truth": "its groups, named by the truth",
}


def to_markdown(found: dict[str, Any]) -> str:
    """A table of `report`, one row for each part and kind of answer."""
    lines = [
        "| part | answer | mIoU | mIoU over foreground pixels | background IoU | pixel accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for part, values in found["parts"].items():
        for kind, scores in values["scores"].items():
            columns = ("mean_iou", "foreground_iou", "background_iou", "pixel_accuracy")
            numbers = " | ".join(f"{scores[column]:.3f}" for column in columns)
            lines.append(f"| {part} | {_WORDS[kind]} | {numbers} |")
    return "\n".join(lines)
