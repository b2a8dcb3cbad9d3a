"""Training of the scenes' classifier: a minute or two on one core."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from jrl.data.images import load_image
from jrl.data.sample import Sample
from jrl.data.scenes import MAX_OBJECTS, SceneMask, read_scenes
from jrl.data.scenes_drawing import COLOURS, SHAPES
from jrl.generation.classifier import CLASSES, GRID, SceneClassifier
from jrl.training.optim import parameter_groups, warmup_cosine

# scenes that neither `jrl fit` with a small seed nor `jrl probe` draws
_SEEDS = 30_000_000
_BATCH, _LR, _DECAY = 64, 3e-3, 0.05
_AT_ONCE = 256


@dataclass(frozen=True)
class Recognition:
    """How well a classifier knows scenes that it was not trained on, at a score of 0.5.

    Attributes:
        recall: share of the classes shown that are found.
        precision: share of the classes found that are shown.
        exact: share of the pictures of which all classes and no other are found.
        scenes: how many were tested.
    """

    recall: float
    precision: float
    exact: float
    scenes: int


@dataclass
class _Labelled:
    pictures: Tensor  # uint8 [N, 3, H, W]
    colour: Tensor  # int64 [N, 16, 16], −1 where no shape covers the cell
    shape: Tensor
    shown: Tensor  # bool [N, classes]


def train_scene_classifier(
    image_size: int = 32,
    *,
    scenes: int = 4000,
    epochs: int = 10,
    width: int = 24,
    max_objects: int = MAX_OBJECTS,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[SceneClassifier, Recognition]:
    """Train a classifier on scenes of its own, from the mask of each.

    AdamW with a linear warm-up and a cosine; half of the batches are mirrored. The same arguments on the same machine give the
    same weights; the state of torch's own generator is left as it was.

    Args:
        image_size: 32 or 64, best that of the pictures to judge.
        scenes: to train on; a quarter as many test it.
        epochs: over them.
        width: of the network.
        max_objects: 1 to 4 shapes in a scene.
        seed: of scenes, weights and order.
        say: is told of each epoch.

    Returns:
        The network in evaluation mode, and how well it does on the test.

    Raises:
        ValueError: a number out of range.
    """
    for name, value, least in (("scenes", scenes, _BATCH), ("epochs", epochs, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    with torch.random.fork_rng(devices=[]):
        # not `torch.manual_seed`, which seeds every GPU's generator too
        torch.default_generator.manual_seed(seed)
        network = SceneClassifier(image_size, width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        samples = read_scenes(
            train=scenes,
            val=0,
            test=scenes // 4,
            test_compositional=0,
            held_out=0,
            size=image_size,
            seed=_SEEDS + seed,
            languages=["en"],
            max_objects=max_objects,
        )
        _fit(network, _labelled(samples.select("train")), epochs, say)
        # as `SceneClassifier.load` has it, so that both say the same to the last bit
        network.to(memory_format=torch.contiguous_format)
    test = _labelled(samples.select("test"))
    return network, _recognition(network, test)


def _fit(network: SceneClassifier, data: _Labelled, epochs: int, say: Callable[[str], None]) -> None:
    start = time.monotonic()
    count = len(data.pictures)
    batches = count // _BATCH
    groups = [{**group, "lr": _LR} for group in parameter_groups(network.parameters(), _DECAY)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = LambdaLR(optimizer, warmup_cosine(epochs * batches // 10, epochs * batches, 0.0))
    for epoch in range(1, epochs + 1):
        network.train()
        total = 0.0
        for rows in torch.randperm(count).tensor_split(batches):
            pictures = data.pictures[rows].float() / 255
            colour, shape = data.colour[rows], data.shape[rows]
            if bool(torch.rand(()) < 0.5):
                pictures, colour, shape = pictures.flip(3), colour.flip(2), shape.flip(2)
            found = network.cells(pictures.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(found.present, (colour >= 0).float())
            for logits, labels in ((found.colour, colour), (found.shape, shape)):
                loss = loss + F.cross_entropy(logits, labels, ignore_index=-1)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        say(f"epoch {epoch} of {epochs}: loss {total / batches:.3f}, {time.monotonic() - start:.0f} s")
    network.eval()


@torch.no_grad()
def _recognition(network: SceneClassifier, test: _Labelled) -> Recognition:
    logits = torch.cat([network(some.float() / 255)[1] for some in test.pictures.split(_AT_ONCE)])
    found = logits > math.log(0.5)
    right = int((found & test.shown).sum())
    return Recognition(
        right / int(test.shown.sum()),
        right / max(1, int(found.sum())),
        float((found == test.shown).all(dim=1).double().mean()),
        len(test.pictures),
    )


def _labelled(samples: Sequence[Sample]) -> _Labelled:
    colours, pictures = list(COLOURS), []
    colour = torch.full((len(samples), GRID, GRID), -1)
    shape, shown = colour.clone(), torch.zeros(len(samples), len(CLASSES), dtype=torch.bool)
    for row, sample in enumerate(samples):
        assert isinstance(sample.mask, SceneMask)
        pictures.append(np.asarray(load_image(sample.image, name=sample.key)))
        # the mask holds 0 for the background, then the objects in their order
        cell = torch.from_numpy(replace(sample.mask, side=GRID)().astype(np.int64))
        kinds = [(colours.index(thing.attributes[-1]), SHAPES.index(thing.label)) for thing in sample.objects]
        known = torch.tensor([(-1, -1), *kinds])[cell]
        colour[row], shape[row] = known.unbind(dim=-1)
        shown[row, [c * len(SHAPES) + s for c, s in kinds]] = True
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return _Labelled(stacked, colour, shape, shown)
