"""Training of one head on a frozen encoder, or together with it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from jrl.downstream.features import Features, encode, encode_part, trunk_of
from jrl.downstream.scenes import PARTS, ScenePart
from jrl.downstream.task import Recipe, Task, Values
from jrl.training.optim import parameter_groups, warmup_cosine

_AT_ONCE = 256
Part = Mapping[str, ScenePart]


@dataclass
class Result:
    """What a head reached.

    Attributes:
        task: its name.
        metric: the score that stands for the task.
        frozen: whether the encoder stayed as it was.
        scores: on the test part.
        baseline: the same scores of somebody who knows the training examples and sees no picture.
        losses: mean loss of training and validation after each epoch.
        best_epoch: the one with the least validation loss, from 1; its weights are the ones tested.
        seconds: of training.
        head, encoder: with those weights, in evaluation mode; the encoder is what the head looks through.
        predictions: on the test part, on the CPU.
        examples: of the test part.
    """

    task: str
    metric: str
    frozen: bool
    scores: dict[str, float]
    baseline: dict[str, float]
    losses: list[tuple[float, float]]
    best_epoch: int
    seconds: float
    head: nn.Module
    encoder: nn.Module
    predictions: Values
    examples: Values


class FrozenFeatures:
    """Features of a frozen encoder, computed when a part is first asked for and kept.

    Args:
        encoder: a `System`, of which its `image_trunk` is taken, or a module from pictures to an `EncoderOutput`.
        data: parts by name.
        device: where the encoder goes.
    """

    def __init__(self, encoder: nn.Module, data: Part, device: str | torch.device = "cpu") -> None:
        self.encoder, self.data, self.device = trunk_of(encoder).to(device), data, device
        self._kept: dict[str, Features] = {}

    def part(self, name: str) -> Features:
        """Those of a whole part, on the CPU."""
        if name not in self._kept:
            self._kept[name] = encode_part(self.encoder, self.data[name], self.device)
        return self._kept[name]

    def __call__(self, name: str, index: Tensor) -> Features:
        """Those of some pictures of a part, on the device."""
        return self.part(name).rows(index).to(self.device)


def fit_head(
    encoder: nn.Module,
    task: Task,
    data: Part,
    *,
    frozen: bool = True,
    epochs: int | None = None,
    lr: float | None = None,
    encoder_lr_factor: float = 0.3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    features: FrozenFeatures | None = None,
) -> Result:
    """Train a head, with the weights of the epoch of least validation loss, and test it.

    The same arguments on the same machine give the same result: the order of the examples, the head's first weights
    and the dropout of an encoder follow from `seed`, and the state of torch's own generator is left as it was.

    Args:
        encoder: a `System`, of which its `image_trunk` is taken, or a module from pictures [B, 3, H, W] to an
            `EncoderOutput`; it is not changed.
        task: what to ask of it.
        data: "train", "val" and "test".
        frozen: leave the encoder as it is; a copy of it is trained too when False.
        epochs: over the training examples; the task's own number when None.
        lr: learning rate of the head; the task's own when None.
        encoder_lr_factor: learning rate of the encoder as a multiple of the head's.
        seed: 0 or more.
        device: where to train.
        features: of this encoder, to share between tasks; computed here when None. Only for a frozen encoder.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: a part is missing, or a number is out of range.
    """
    recipe = _recipe(task, data, epochs, lr, encoder_lr_factor, seed)
    start = time.perf_counter()
    with _seeded(seed, device):
        task.prepare(data["train"].samples)
        examples = {name: task.examples(data[name].samples) for name in PARTS}
        for name in PARTS:
            if not len(examples[name]["image"]):
                raise ValueError(f"{name}: the scenes have no example for {task.name}")
        if frozen:
            look = FrozenFeatures(encoder, data, device) if features is None else features
            sight: _Sight = _Cached(look)
        else:
            sight = _Trained(copy.deepcopy(trunk_of(encoder)).to(device), data, device)
        first = sight("train", examples["train"]["image"][:1])
        head = task.head(first.global_.shape[1], first.tokens.shape[2]).to(device)
        losses, best = _train(sight, head, task, examples, recipe, encoder_lr_factor, device)
    sight.rest()
    head.eval()
    predictions = _predict(sight, head, task, examples["test"], device)
    blind = task.baseline(examples["train"], examples["test"])
    return Result(
        task.name,
        task.metric,
        frozen,
        task.score(predictions, examples["test"]),
        task.score(blind, examples["test"]),
        losses,
        best,
        time.perf_counter() - start,
        head,
        sight.encoder,
        predictions,
        examples["test"],
    )


class _Sight:
    """Pictures to features, in training and at rest."""

    encoder: nn.Module

    def __call__(self, name: str, index: Tensor) -> Features:
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        return []

    def train(self) -> None:
        """Be ready for a step."""

    def rest(self) -> None:
        """Be ready for an evaluation."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up an earlier state."""


class _Cached(_Sight):
    def __init__(self, features: FrozenFeatures) -> None:
        self.features, self.encoder = features, features.encoder

    def __call__(self, name: str, index: Tensor) -> Features:
        return self.features(name, index)


class _Trained(_Sight):
    def __init__(self, encoder: nn.Module, data: Part, device: str | torch.device) -> None:
        self.encoder, self.data, self.device = encoder.requires_grad_(True), data, device

    def __call__(self, name: str, index: Tensor) -> Features:
        return encode(self.encoder, self.data[name].pixels[index].to(self.device))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.parameters())

    def train(self) -> None:
        self.encoder.train()

    def rest(self) -> None:
        self.encoder.eval()

    def state(self) -> dict[str, Tensor]:
        return _copied(self.encoder)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.encoder.load_state_dict(state)


def _train(
    sight: _Sight,
    head: nn.Module,
    task: Task,
    examples: Mapping[str, Values],
    recipe: Recipe,
    encoder_lr_factor: float,
    device: str | torch.device,
) -> tuple[list[tuple[float, float]], int]:
    groups = [
        {**group, "lr": recipe.lr} for group in parameter_groups(head.parameters(), recipe.weight_decay)
    ]
    if sight.parameters():
        more = parameter_groups(sight.parameters(), recipe.weight_decay)
        groups += [{**group, "lr": recipe.lr * encoder_lr_factor} for group in more]
    count = len(examples["train"]["image"])
    batches = -(-count // recipe.batch_size)
    steps = recipe.epochs * batches
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    schedule = LambdaLR(optimizer, warmup_cosine(steps // 10, steps, 0.0))
    parameters = [parameter for group in groups for parameter in group["params"]]
    losses: list[tuple[float, float]] = []
    best, best_epoch = math.inf, 0
    kept: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for epoch in range(1, recipe.epochs + 1):
        sight.train()
        head.train()
        total = 0.0
        # batches of nearly one size: the statistics of a last one with a single picture would be worthless
        for rows in torch.randperm(count).tensor_split(batches):
            batch = _rows(examples["train"], rows, device)
            loss = task.loss(head, sight("train", examples["train"]["image"][rows]), batch)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"{task.name}: the loss is {loss.item()} in epoch {epoch}; lower lr")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        val = _mean_loss(sight, head, task, examples["val"], device)
        losses.append((total / count, val))
        if val < best or not best_epoch:
            best, best_epoch, kept = val, epoch, (_copied(head), sight.state())
    head.load_state_dict(kept[0])
    sight.restore(kept[1])
    return losses, best_epoch


@torch.no_grad()
def _mean_loss(
    sight: _Sight, head: nn.Module, task: Task, values: Values, device: str | torch.device
) -> float:
    sight.rest()
    head.eval()
    total, count = 0.0, len(values["image"])
    for rows in torch.arange(count).split(_AT_ONCE):
        batch = _rows(values, rows, device)
        total += float(task.loss(head, sight("val", values["image"][rows]), batch)) * len(rows)
    return total / count


@torch.no_grad()
def _predict(
    sight: _Sight, head: nn.Module, task: Task, values: Values, device: str | torch.device
) -> Values:
    found: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(values["image"])).split(_AT_ONCE):
        batch = _rows(values, rows, device)
        for name, value in task.predict(head, sight("test", values["image"][rows]), batch).items():
            found.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def _rows(values: Values, rows: Tensor, device: str | torch.device) -> Values:
    return {name: value[rows].to(device) for name, value in values.items()}


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@contextmanager
def _seeded(seed: int, device: str | torch.device) -> Iterator[None]:
    kind = torch.device(device)
    devices = [kind] if kind.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _recipe(
    task: Task, data: Part, epochs: int | None, lr: float | None, encoder_lr_factor: float, seed: int
) -> Recipe:
    missing = [name for name in PARTS if name not in data]
    if missing:
        raise ValueError(f"data: expected the parts {', '.join(PARTS)}, {', '.join(missing)} missing")
    recipe = task.recipe
    if epochs is not None:
        if epochs < 1:
            raise ValueError(f"epochs: expected at least 1, got {epochs}")
        recipe = replace(recipe, epochs=epochs)
    if lr is not None:
        if not 0 < lr < math.inf:
            raise ValueError(f"lr: expected a positive number, got {lr}")
        recipe = replace(recipe, lr=lr)
    if not 0 < encoder_lr_factor < math.inf:
        raise ValueError(f"encoder_lr_factor: expected a positive number, got {encoder_lr_factor}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    return recipe
