"""XMC-GAN trains: its pictures take the colours that their texts name, and a resumed run is the uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from jrl.training import SystemModule
from jrl.training.drawing import draw

from .conftest import COLOURS
from .xmc_gan_fixtures import AtBatch, build, data, fit


def stop(system: Any) -> None:
    raise RuntimeError("pulled the plug")


@pytest.mark.parametrize("every", [None, 7])
def test_resume_reproduces(pictures: Path, tmp_path: Path, every: int | None) -> None:
    """At the end of an epoch and inside one: networks, spectral vectors, statistics, average and optimisers are saved."""
    whole = fit(tmp_path / "whole", build(), data(pictures), epochs=3)
    cut = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(cut, build(), data(pictures), epochs=3, every=every, callbacks=[AtBatch(9, stop)])
    kept = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == (18 if every is None else 21)
    resumed = fit(cut, build(seed=5), data(pictures), epochs=3, every=every, resume=True)
    expected, found = whole.system.state_dict(), resumed.system.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    begun = build().state_dict()
    for name in (
        "generator.start.weight",
        "average.start.weight",
        "discriminator.sentence.parametrizations.weight.0._u",
    ):
        assert not torch.equal(found[name], begun[name])


def test_the_end_is_saved_and_goes_on(pictures: Path, tmp_path: Path) -> None:
    """Also where no checkpoint was due: a longer run goes on from it as if it had never stopped."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    fit(tmp_path, build(), data(pictures), epochs=2, every=30, final_lr_factor=1.0)
    assert torch.load(path, weights_only=True)["global_step"] == 36
    longer = fit(
        tmp_path, build(seed=5), data(pictures), epochs=3, every=30, resume=True, final_lr_factor=1.0
    )
    whole = fit(tmp_path / "whole", build(), data(pictures), epochs=3, final_lr_factor=1.0)
    found = longer.system.state_dict()
    for name, value in whole.system.state_dict().items():
        assert torch.equal(found[name], value), name
    done = fit(tmp_path, build(seed=6), data(pictures), epochs=3, every=30, resume=True)
    assert done.trainer.global_step == 54


class Steps(Callback):
    """The steps of which there is a checkpoint after each batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[int] = []

    def on_train_batch_start(self, *rest: Any) -> None:
        if self.path.exists():
            self.seen.append(torch.load(self.path, weights_only=True)["global_step"])


def test_a_checkpoint_follows_the_batch_in_which_it_was_due(pictures: Path, tmp_path: Path) -> None:
    """Three steps a batch, and a checkpoint every seven: after 9, 15, 21 and 30."""
    steps = Steps(tmp_path / "checkpoints" / "last.ckpt")
    fit(tmp_path, build(), data(pictures), epochs=2, every=7, callbacks=[steps])
    assert sorted(set(steps.seen)) == [9, 15, 21, 30]


class KeepOfRank(Callback):
    """Writes what each rank has in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(
            {name: p.detach().clone() for name, p in pl_module.system.named_parameters()},
            self.folder / f"{trainer.global_rank}.pt",
        )


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_keep_the_same_weights(pictures: Path, tmp_path: Path) -> None:
    """Gradients of both optimisers are averaged, in the shared pass too: ranks with other batches end with the same weights."""
    system = build()
    begun = {name: p.clone() for name, p in system.named_parameters()}
    fit(
        tmp_path, system, data(pictures), epochs=1, devices=2, strategy="ddp_fork", plugins=[],
        callbacks=[KeepOfRank(tmp_path)],
    )  # fmt: skip
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name in (
        "generator.start.weight",
        "average.start.weight",
        "discriminator.logit.parametrizations.weight.original",
    ):
        assert not torch.equal(first[name], begun[name])


def test_learns_colours(pictures: Path, tmp_path: Path) -> None:
    """Of 96 pictures more than twice as many as by chance, one in six, are nearest to the colour of their text."""
    system = build(average_decay=0.9, discriminator_lr_factor=2.0, discriminator_steps=1)
    given = data(pictures, batch_size=24)
    fit(tmp_path, system, given, epochs=60, lr=2e-3)
    texts = [
        f"a large {colour} {shape}" for colour in COLOURS for shape in ("circle", "square", "bar", "frame")
    ]
    assert given.tokenizer is not None
    drawn = draw(system, given.tokenizer, texts, max_length=16, count=4)
    # what a picture has beside its white background has the colour's direction
    tint = (1 - drawn).mean(dim=(-1, -2))
    palette = 1 - torch.tensor(list(COLOURS.values())) / 255
    nearest = torch.nn.functional.cosine_similarity(tint[:, :, None], palette, dim=-1).argmax(-1)
    truth = torch.arange(len(COLOURS)).repeat_interleave(4)[:, None]
    accuracy = (nearest == truth).float().mean().item()
    assert accuracy > 1 / 3, accuracy


class Plain(SystemModule):
    """Steps straight along the gradients, so that their size shows."""

    def configure_optimizers(self) -> Any:
        _, schedulers = super().configure_optimizers()
        specs = self.system.optimization()
        optimizers = [torch.optim.SGD(spec.parameters, lr=self.lr * spec.lr_factor) for spec in specs]
        for optimizer, schedule in zip(optimizers, schedulers, strict=True):
            schedule["scheduler"] = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        return optimizers, schedulers


class SameInput(Callback):
    """Noise that follows from each picture, and no statistics of the rank's own batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch["noise"] = batch["pixel_values"].flatten(1)[:, ::512].contiguous()
        pl_module.system.generator.eval()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_step_as_one(pictures: Path, tmp_path: Path) -> None:
    """A batch of 16 in one process and of 8 in each of two: every loss is over all pairs, every gradient their mean."""
    begun = build(discriminator_steps=1).state_dict()
    found = []
    for ranks in (1, 2):
        spread = {"devices": 2, "strategy": "ddp_fork", "plugins": []} if ranks == 2 else {}
        folder = tmp_path / str(ranks)
        folder.mkdir()
        fit(
            folder, build(discriminator_steps=1), data(pictures, batch_size=16 // ranks), epochs=1, kind=Plain, lr=1e-2,
            callbacks=[SameInput(), KeepOfRank(folder)], limit_train_batches=1, **spread,
        )  # fmt: skip
        found.append(torch.load(folder / "0.pt"))
    one, two = found
    for network in ("generator.", "discriminator."):
        names = [name for name in one if name.startswith(network)]
        moved = [torch.cat([(values[n] - begun[n]).flatten() for n in names]) for values in (one, two)]
        assert moved[0].norm() > 1e-3
        torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-3 * float(moved[0].abs().max()))
