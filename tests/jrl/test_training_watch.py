"""A failed run stops in words, and its last checkpoint is a good one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from jrl.training import AtomicCheckpointIO, checkpoint_callbacks
from jrl.training.watch import TrainingWatch

from .xmc_gan_fixtures import AtBatch, build, data, fit

STEPS = 3
"""Of the optimisers, a batch: two of the discriminator and one of the generator."""


def last(run: Path) -> dict[str, Any]:
    checkpoint = AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert all(bool(v.isfinite().all()) for v in checkpoint["state_dict"].values() if v.is_floating_point())
    return checkpoint


def spoil(system: Any) -> None:
    system.generator.pixels.weight[0, 0] = torch.nan


def test_a_loss_that_is_not_finite(pictures: Path, tmp_path: Path) -> None:
    # after four batches: one after the checkpoint
    with pytest.raises(FloatingPointError) as error:
        fit(tmp_path, build(), data(pictures), every=3 * STEPS, callbacks=[AtBatch(4, spoil)])
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert re.fullmatch(
        rf"loss 'hinge_discriminator' is nan at step {4 * STEPS}; lower lr, or look for NaN in the data; "
        rf"the last good checkpoint is {re.escape(str(path))}, of step {3 * STEPS}",
        str(error.value),
    )
    assert last(tmp_path)["global_step"] == 3 * STEPS


class SpoilAfter(Callback):
    """Weights that break in the step itself, whose losses were fine."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 6 * STEPS:
            with torch.no_grad():
                spoil(pl_module.system)


def test_weights_that_are_not_finite_are_never_saved(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"weights 'system.generator.pixels.weight' are not finite at step 18"
    ):
        fit(tmp_path, build(), data(pictures), every=3 * STEPS, callbacks=[SpoilAfter()])
    assert last(tmp_path)["global_step"] == 3 * STEPS


class SpoilLast(Callback):
    """Weights that break in the last step of all."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 12 * STEPS:
            with torch.no_grad():
                spoil(pl_module.system)


def test_weights_that_are_not_finite_are_never_exported(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"pixels.weight' are not finite at step 36; .* of step 30"):
        fit(tmp_path, build(), data(pictures), every=5 * STEPS, callbacks=[SpoilLast()])
    assert last(tmp_path)["global_step"] == 10 * STEPS
    assert not (tmp_path / "model").exists()


def collapse(system: Any) -> None:
    system.generator.pixels.weight.zero_()


def test_collapse(pictures: Path, tmp_path: Path) -> None:
    watch = TrainingWatch(collapse=0.2, after=2, decay=0.5)
    with pytest.raises(FloatingPointError) as error:
        fit(
            tmp_path,
            build(),
            data(pictures),
            epochs=4,
            every=STEPS,
            callbacks=[watch, AtBatch(5, collapse, always=True)],
        )
    message = str(error.value)
    assert message.startswith("the generated pictures have become alike at step ")
    assert "less than `collapse` 0.2" in message
    checkpoint = last(tmp_path)
    assert f"last.ckpt, of step {checkpoint['global_step']}" in message
    (kept,) = (state for name, state in checkpoint["callbacks"].items() if name == "TrainingWatch")
    assert kept["ratio"] >= 0.2


def test_no_collapse_where_none_is_looked_for(pictures: Path, tmp_path: Path) -> None:
    for name, watch in (("off", TrainingWatch(collapse=0)), ("early", TrainingWatch(after=100))):
        fit(tmp_path / name, build(), data(pictures), callbacks=[watch, AtBatch(5, collapse, always=True)])


def test_one_pair_a_turn_says_nothing_of_a_collapse(pictures: Path, tmp_path: Path) -> None:
    fit(tmp_path, build(), data(pictures, batch_size=2), epochs=1, callbacks=[TrainingWatch(after=5)])


def test_no_checkpoint_yet(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="no checkpoint has been written yet"):
        fit(tmp_path, build(), data(pictures), callbacks=[AtBatch(2, spoil)])


def test_no_checkpoint_every_no_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_every: expected at least 1, got 0"):
        checkpoint_callbacks(tmp_path, every=0, monitor=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collapse": 1.0}, "collapse: expected a share"),
        ({"decay": 1.0}, "decay: expected a value"),
        ({"every": 0}, "after, every: expected at least 0 and 1"),
    ],
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingWatch(**options)
