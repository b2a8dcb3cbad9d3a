"""Training: data order, augmentation, optimisers, checkpoints, resume."""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from jrl.data.images import Augment
from jrl.encoders import ImageEncoder, TextEncoder
from jrl.systems import CLIP, load_system
from jrl.training import AtomicCheckpointIO, CaptionDataModule, SystemModule, checkpoint_callbacks
from jrl.training.augment import augment_batch
from jrl.training.loader import EpochLoader, PartLoader
from jrl.training.optim import parameter_groups, warmup_cosine

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout_prob": 0.1,
    **SMALL,
}
BERT: dict[str, Any] = {"model_type": "bert", "vocab_size": 300, "max_position_embeddings": 32, **SMALL}


class Numbers:
    """A source whose batch is the examples' numbers and one draw."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, seed: int) -> dict[str, Any]:
        return {"indices": indices, "draw": torch.rand(1, generator=torch.Generator().manual_seed(seed))}


def listing(loader: Any) -> list[tuple[list[int], float]]:
    return [(batch["indices"].tolist(), batch["draw"].item()) for batch in loader]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, again, other = (EpochLoader(Numbers(23), 4, seed=seed) for seed in (0, 0, 1))
    epochs = [listing(first), listing(first)]
    torch.manual_seed(123)
    assert [listing(again), listing(again)] == epochs
    assert epochs[0] != epochs[1]
    assert listing(other) != epochs[0]
    assert len(epochs[0]) == len(first) == 5
    assert len({index for batch, _ in epochs[0] for index in batch}) == 20


def test_resumed_epoch_goes_on_where_it_was() -> None:
    whole = EpochLoader(Numbers(40), 4, position=lambda: (3, 0))
    part = EpochLoader(Numbers(40), 4, position=lambda: (3, 6))
    assert listing(part) == listing(whole)[6:]


def test_workers_change_nothing() -> None:
    assert listing(EpochLoader(Numbers(24), 4, workers=2)) == listing(EpochLoader(Numbers(24), 4))


def test_ranks_share_an_epoch_without_overlap() -> None:
    ranks = [listing(EpochLoader(Numbers(50), 4, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [4, 4, 4]
    seen = [index for rank in ranks for batch, _ in rank for index in batch]
    assert len(seen) == len(set(seen)) == 48
    assert len({draw for rank in ranks for _, draw in rank}) == 12


def test_part_loader_visits_all_in_order() -> None:
    batches = listing(PartLoader(Numbers(7), 3, name="val"))
    assert [batch for batch, _ in batches] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 30}, "there are 23"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"workers": -1}, "workers"),
    ],
)
def test_loader_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EpochLoader(Numbers(23), **{"batch_size": 4, **options})


def test_augmentation_off_is_the_identity() -> None:
    pixels = torch.rand(3, 3, 8, 8)
    off = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.equal(augment_batch(pixels, off, torch.Generator()), pixels)


def test_flip_mirrors_every_picture_at_probability_one() -> None:
    pixels = torch.rand(3, 3, 8, 8)
    flip = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0)
    assert torch.allclose(augment_batch(pixels, flip, torch.Generator()), pixels.flip(-1), atol=1e-5)


def test_shift_uncovers_the_fill() -> None:
    pixels = torch.zeros(64, 3, 8, 8)
    shift = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), translate=0.5, fill=1.0)
    moved = augment_batch(pixels, shift, torch.Generator().manual_seed(0))
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    assert (moved.amax(dim=(1, 2, 3)) > 0.9).float().mean() > 0.8


def test_crop_keeps_its_share() -> None:
    ramp = torch.linspace(0, 1, 64).expand(256, 3, 64, 64)
    crop = Augment(scale=(0.25, 0.25), ratio=(1.0, 1.0))
    cropped = augment_batch(ramp, crop, torch.Generator().manual_seed(0))
    # a quarter of the area is half the width
    assert torch.allclose((cropped[..., -1] - cropped[..., 0]).mean(), torch.tensor(0.5), atol=0.01)
    assert cropped[..., 0].min() < 0.05
    assert cropped[..., -1].max() > 0.95


@pytest.mark.parametrize("field", ["brightness", "contrast", "saturation"])
def test_colour_changes_move_pixels_and_stay_in_range(field: str) -> None:
    pixels = torch.rand(16, 3, 8, 8)
    changed = augment_batch(
        pixels, Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), **{field: 0.8}), torch.Generator().manual_seed(1)
    )
    assert not torch.allclose(changed, pixels, atol=1e-2)
    assert changed.min() >= 0
    assert changed.max() <= 1
    again = augment_batch(
        pixels, Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), **{field: 0.8}), torch.Generator().manual_seed(1)
    )
    assert torch.equal(changed, again)


def test_augmentation_refuses_bytes_and_odd_shapes() -> None:
    with pytest.raises(TypeError, match="pixels"):
        augment_batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), Augment(), torch.Generator())
    with pytest.raises(ValueError, match="pixels"):
        augment_batch(torch.zeros(1, 3, 8, 9), Augment(), torch.Generator())


def test_only_matrices_decay() -> None:
    system = CLIP(ImageEncoder(VIT), TextEncoder(BERT), 16)
    decayed, plain = parameter_groups(system.parameters(), 0.2)
    assert decayed["weight_decay"] == 0.2
    assert plain["weight_decay"] == 0.0
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert any(parameter is system.objective.log_scale for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(system.parameters()))
    with pytest.raises(ValueError, match="nothing to optimise"):
        parameter_groups([nn.Parameter(torch.zeros(2), requires_grad=False)], 0.1)


def test_schedule_rises_and_falls() -> None:
    factor = warmup_cosine(4, 20, 0.1)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1
    assert factor(12) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(20) == factor(99) == pytest.approx(0.1)
    warm = warmup_cosine(4, 20, 0.1, start_factor=0.2)
    assert [warm(step) for step in range(5)] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])
    assert [warm(step) for step in range(4, 30)] == [factor(step) for step in range(4, 30)]
    with pytest.raises(ValueError, match="start_factor"):
        warmup_cosine(1, 20, 0.1, -0.5)
    with pytest.raises(ValueError, match="warmup_steps"):
        warmup_cosine(20, 20, 0.1)
    with pytest.raises(ValueError, match="final_factor"):
        warmup_cosine(1, 20, 1.5)


def test_checkpoint_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"state_dict": {"w": torch.arange(3)}, "epoch": 2}, path)
    assert torch.equal(writer.load_checkpoint(path)["state_dict"]["w"], torch.arange(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        writer.load_checkpoint(tmp_path / "absent.ckpt")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"last.ckpt: unreadable or truncated"):
        writer.load_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="not a training checkpoint"):
        writer.load_checkpoint(path)
    torch.save({"state_dict": {}, "hook": print}, path)
    with pytest.raises(ValueError, match="unreadable"):
        writer.load_checkpoint(path)
    with pytest.raises(ValueError, match="weights_only"):
        writer.load_checkpoint(path, weights_only=False)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"state_dict": {}, "epoch": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"last.ckpt: the checkpoint could not be saved.*; \d+ MiB are free there"
        ):
            writer.save_checkpoint({"state_dict": {"w": torch.zeros(1_000_000)}, "epoch": 2}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_resuming_with_other_batches_is_refused(
    tmp_path: Path, config: Callable[..., dict[str, Any]]
) -> None:
    fit(tmp_path, config(), every=3, stop=6)
    with pytest.raises(ValueError, match="batch_size was 8, is 16"):
        fit(tmp_path, config(data={"batch_size": 16}), every=3, resume=True)


class Stop(Exception):
    pass


class StopAt(lightning.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Stop


def fit(
    run: Path,
    config: dict[str, Any],
    *,
    every: int | None = None,
    monitor: str | None = None,
    stop: int | None = None,
    resume: bool = False,
    module: SystemModule | None = None,
    averaged: bool = False,
    **options: Any,
) -> tuple[SystemModule, lightning.Trainer]:
    torch.manual_seed(0)
    if module is None:
        module = SystemModule(CLIP(ImageEncoder(VIT), TextEncoder(BERT), 16), lr=2e-3)
    data = {key: value for key, value in config["data"].items() if key != "augment"}
    callbacks = checkpoint_callbacks(run, every=every, monitor=monitor)
    trainer = lightning.Trainer(
        **{**config["trainer"], **options},
        callbacks=[
            *callbacks,
            *([StopAt(stop)] if stop is not None else []),
            *([EMAWeightAveraging(decay=0.5)] if averaged else []),
        ],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        default_root_dir=run,
    )
    checkpoint = str(run / "checkpoints" / "last.ckpt") if resume else None
    with contextlib.suppress(Stop):
        trainer.fit(module, CaptionDataModule(**data, augment=Augment(translate=0.1)), ckpt_path=checkpoint)
    return module, trainer


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(ours, theirs) for (_, ours), theirs in pairs)


# an epoch has 4 steps: within an epoch, at its last step, at its end, after a validation
@pytest.mark.parametrize(("every", "stop"), [(3, 4), (3, 7), (4, 6), (5, 11), (1, 8), (None, 6), (None, 8)])
def test_resume_gives_the_weights_of_an_uninterrupted_run(
    tmp_path: Path, config: Callable[..., dict[str, Any]], every: int | None, stop: int
) -> None:
    values = config()
    whole, trainer = fit(tmp_path / "whole", values)
    assert trainer.global_step == 16
    fit(tmp_path / "cut", values, every=every, stop=stop)
    assert (tmp_path / "cut" / "checkpoints" / "last.ckpt").is_file()
    resumed, trainer = fit(tmp_path / "cut", values, every=every, resume=True)
    assert trainer.global_step == 16
    assert same_weights(resumed, whole)


def test_resume_with_averaged_weights(tmp_path: Path, config: Callable[..., dict[str, Any]]) -> None:
    """What configs/clip_emoji.yaml asks for: the run ends with a moving average of its weights, resumed or not."""
    plain, _ = fit(tmp_path / "plain", config())
    whole, _ = fit(tmp_path / "whole", config(), averaged=True)
    assert not same_weights(plain, whole)
    fit(tmp_path / "cut", config(), every=3, stop=7, averaged=True)
    resumed, _ = fit(tmp_path / "cut", config(), every=3, resume=True, averaged=True)
    assert same_weights(resumed, whole)
    exported = load_system(tmp_path / "cut" / "model")
    for name, value in whole.system.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value), name


def test_training_passes_a_bar_and_keeps_last_and_best(
    tmp_path: Path, config: Callable[..., dict[str, Any]]
) -> None:
    values = config(trainer={"max_epochs": 30})
    _, trainer = fit(tmp_path, values, monitor="val/mean_recall")
    assert (
        trainer.callback_metrics["val/mean_recall"] > 0.7
    )  # chance is 0.41 on 13 pictures, none seen in training
    assert {file.name for file in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert {"config.json", "model.safetensors", "preprocessing.json", "tokenizer"} <= {
        file.name for file in (tmp_path / "model").iterdir()
    }


def test_a_finished_run_without_export_is_exported(
    tmp_path: Path, config: Callable[..., dict[str, Any]]
) -> None:
    trained, _ = fit(tmp_path, config(trainer={"max_epochs": 1}))
    shutil.rmtree(tmp_path / "model")
    fit(tmp_path, config(trainer={"max_epochs": 1}), resume=True)
    assert same_weights(CLIP.from_pretrained(tmp_path / "model"), trained.system)


def test_unknown_monitor_is_named(tmp_path: Path, config: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(
        ValueError, match=r"monitor: validation logs no 'val/loss'; it logs .*val/mean_recall"
    ):
        fit(tmp_path, config(), monitor="val/loss")


def test_bfloat16_and_files_with_workers(tmp_path: Path, config: Callable[..., dict[str, Any]]) -> None:
    values = config(trainer={"max_epochs": 1}, data={"in_memory": False, "workers": 1})
    module, _ = fit(tmp_path, values, precision="bf16-mixed", gradient_clip_val=1.0)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    assert module.system.objective.log_scale.dtype == torch.float32


def test_frozen_parts_do_not_move(tmp_path: Path, config: Callable[..., dict[str, Any]]) -> None:
    system = CLIP(ImageEncoder(VIT), TextEncoder(BERT), 16)
    before = [value.clone() for value in system.image_encoder.state_dict().values()]
    text_before = system.text_encoder.model.embeddings.word_embeddings.weight.detach().clone()
    module = SystemModule(system, lr=2e-3, freeze=("image_encoder",))
    fit(tmp_path, config(trainer={"max_epochs": 1}), module=module)
    assert all(
        torch.equal(a, b) for a, b in zip(before, system.image_encoder.state_dict().values(), strict=True)
    )
    assert not torch.equal(text_before, system.text_encoder.model.embeddings.word_embeddings.weight)
    with pytest.raises(ValueError, match="freeze"):
        SystemModule(system, freeze=("image_tower",))


class Diverging(CLIP):
    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, plots = super().forward(batch)
        return {"contrastive": losses["contrastive"] * math.nan}, plots


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, config: Callable[..., dict[str, Any]]
) -> None:
    module = SystemModule(Diverging(ImageEncoder(VIT), TextEncoder(BERT), 16))
    with pytest.raises(FloatingPointError, match="loss 'contrastive' is nan at step 1"):
        fit(tmp_path, config(), module=module)
