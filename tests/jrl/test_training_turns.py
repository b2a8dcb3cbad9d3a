"""Several optimisers in one system: whose losses move what, turns that share a pass, and what the module refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from jrl.encoders import EncoderOutput
from jrl.systems import OptimizerSpec, System, Turn
from jrl.training import CaptionDataModule, SystemModule


def fit(config: dict[str, Any], module: SystemModule) -> lightning.Trainer:
    torch.manual_seed(0)
    data = {key: value for key, value in config["data"].items() if key != "augment"}
    trainer = lightning.Trainer(**config["trainer"], enable_checkpointing=False, logger=False)
    trainer.fit(module, CaptionDataModule(**data))
    return trainer


class Duel(System):
    """Two parameters pulled to different places by two losses, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {
            "left": (self.left - 1).square().sum() + self.right.sum(),
            "right": (self.right + 1).square().sum() - self.left.sum(),
        }, {"gap": (self.left - self.right).abs().mean().detach()}

    def encode_image(self, pixel_values: Tensor) -> EncoderOutput:
        return EncoderOutput(pixel_values.flatten(1)[:, :4], pixel_values.flatten(2))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        return EncoderOutput(input_ids[:, :4].float(), input_ids[..., None].float())

    def to_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _assemble(cls, config: dict[str, Any]) -> Duel:
        return cls()

    def optimization(self) -> list[OptimizerSpec]:
        return [
            OptimizerSpec([self.left], losses=("left",), weight_decay=0.0),
            OptimizerSpec([self.right], losses=("right",), lr_factor=0.0001, weight_decay=0.0),
        ]


class SharedDuel(Duel):
    """Left steps on half of the batch, then both step on one pass over the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, tuple[int, ...], bool, bool]] = []

    def turns(self, batch: dict[str, Any]) -> list[Turn]:
        rows = len(batch["pixel_values"]) // 2
        first, second = (
            {"pixel_values": part} for part in (batch["pixel_values"][:rows], batch["pixel_values"][rows:])
        )
        return [Turn(first, (0,)), Turn(second, (0, 1))]

    @property
    def steps_per_batch(self) -> int:
        return 3

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.requires = self.left.requires_grad, self.right.requires_grad
        return super().forward(batch)

    def after_turn(self, turn: Turn) -> None:
        self.seen.append((len(turn.batch["pixel_values"]), turn.optimizers, *self.requires))


def test_optimisers_share_a_pass(config: Callable[..., dict[str, Any]]) -> None:
    system = SharedDuel()
    trainer = fit(config(trainer={"max_epochs": 15}), SystemModule(system, lr=0.2, warmup=0.0))
    assert trainer.global_step == 3 * 60
    assert [(turn, grads) for _, turn, *grads in system.seen[:2]] == [
        ((0,), [True, False]),
        ((0, 1), [True, True]),
    ]
    assert system.left.requires_grad and system.right.requires_grad
    assert torch.allclose(system.left, torch.ones(2, 2), atol=0.1)
    assert bool((system.right < 0).all()) and bool((system.right > -0.01).all())
    # the schedules advance once a batch, so they are at their end when the run is
    assert [group["lr"] for o in trainer.optimizers for group in o.param_groups] == pytest.approx([0.0, 0.0])


def test_several_optimisers_each_follow_their_losses(config: Callable[..., dict[str, Any]]) -> None:
    system = Duel()
    trainer = fit(config(trainer={"max_epochs": 15}), SystemModule(system, lr=0.2))
    assert trainer.global_step == 2 * 60
    assert torch.allclose(system.left, torch.ones(2, 2), atol=0.1)
    # it moves the right way, 10⁴ times more slowly, and the other loss does not pull it
    assert bool((system.right < 0).all())
    assert bool((system.right > -0.01).all())


def test_any_seed_of_the_command_line_seeds_a_step(config: Callable[..., dict[str, Any]]) -> None:
    fit(config(trainer={"max_epochs": 1, "limit_train_batches": 1}), SystemModule(Duel(), seed=2**32 - 1))


def test_several_optimisers_refuse_the_scaler_of_float16(config: Callable[..., dict[str, Any]]) -> None:
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(
        ValueError, match="precision: SharedDuel has 2 optimisers, which train with 'bf16-mixed' or"
    ):
        fit(config(trainer={"max_epochs": 1, "plugins": [scaled]}), SystemModule(SharedDuel()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup": 2.5}, "warmup"),
        ({"warmup": -1.0}, "warmup"),
        ({"seed": -1}, "seed"),
    ],
)
def test_module_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SystemModule(Duel(), **options)
