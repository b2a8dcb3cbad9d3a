"""A small XMC-GAN and what trains it on the pictures of `conftest.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from jrl.encoders import TextEncoder
from jrl.systems.xmc_gan import XMCGAN, Discriminator, Generator
from jrl.training import AtomicCheckpointIO, CaptionDataModule, SystemModule, checkpoint_callbacks

BERT = {
    "model_type": "bert",
    "vocab_size": 300,
    "max_position_embeddings": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def build(seed: int = 0, **options: Any) -> XMCGAN:
    """A system of 32 pixels whose text encoder is random."""
    torch.manual_seed(seed)
    return XMCGAN(
        Generator(32, text_dim=16, width=4, noise_dim=6, condition_dim=5),
        Discriminator(32, text_dim=16, width=4),
        TextEncoder(BERT),
        **{"sentence_pooling": "mean", **options},
    )


def data(pictures: Path, **options: Any) -> CaptionDataModule:
    """The pictures in [0, 1], in batches of 8: 6 batches an epoch."""
    return CaptionDataModule(
        "folder",
        {"root": str(pictures)},
        **{
            "image_size": 32, "batch_size": 8, "vocab_size": 300, "max_length": 16, "val_splits": (),
            "mean": (0, 0, 0), "std": (1, 1, 1), **options,
        },
    )  # fmt: skip


def fit(
    run: Path,
    system: XMCGAN,
    module_data: CaptionDataModule,
    *,
    epochs: int = 2,
    every: int | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    lr: float = 1e-3,
    final_lr_factor: float = 0.0,
    kind: type[SystemModule] = SystemModule,
    **trainer: Any,
) -> SystemModule:
    """Train as `jrl fit` does, with a checkpoint every so many steps of all optimisers."""
    module = kind(
        system, lr=lr, betas=(0.5, 0.999), warmup=0.0, weight_decay=0.0, final_lr_factor=final_lr_factor
    )
    trained = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=trainer.pop("devices", 1),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
        callbacks=[*callbacks, *checkpoint_callbacks(run, every=every, monitor=None)],
        plugins=trainer.pop("plugins", [AtomicCheckpointIO()]),
        **trainer,
    )
    trained.fit(module, module_data, ckpt_path=str(run / "checkpoints" / "last.ckpt") if resume else None)
    return module


class AtBatch(Callback):
    """Calls a function with the system before one batch, or before it and all that follow."""

    def __init__(self, batch: int, change: Callable[[Any], Any], *, always: bool = False) -> None:
        self.batch, self.change, self.always = batch, change, always

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if done == self.batch or (self.always and done > self.batch):
            with torch.no_grad():
                self.change(pl_module.system)
