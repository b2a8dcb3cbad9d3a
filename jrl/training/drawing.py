"""Pictures of texts by a system that generates, and what becomes of them while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import PIL.Image
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jrl.data.images import save_image
from jrl.data.sample import SkipReport
from jrl.systems import XMCGAN, System
from jrl.training.captions import with_captions
from jrl.training.run import picture_grid


@torch.no_grad()
def draw(
    system: System,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int,
    count: int = 1,
    seed: int = 0,
    averaged: bool = True,
    batch_size: int = 64,
) -> Tensor:
    """Several pictures of every text.

    Picture k of every text comes from the same noise, which depends on (`seed`, k) alone: pictures of one column differ by their
    texts, and a picture does not depend on what else is drawn (to rounding).

    Args:
        system: an `XMCGAN`.
        tokenizer, max_length: of its texts; longer ones are cut.
        texts: one or more.
        count: pictures a text.
        seed: of the noise.
        averaged: by the moving average of the generator, or by the generator itself.
        batch_size: pictures drawn together.

    Returns:
        [len(texts), count, 3, H, W] in [0, 1], on the CPU.

    Raises:
        ValueError: the system does not generate pictures, no text, a blank one, a count below 1 or a negative seed.
    """
    system = _generating(system)
    _check_drawing(texts, count, seed)
    # padded to one length: the text encoder's padding is part of the sentence vector with `sentence_pooling` "code"
    tokens = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
    )
    device = next(system.generator.parameters()).device
    noise = torch.stack([_noise(seed, k, system.generator.noise_dim) for k in range(count)]).to(device)
    pictures = []
    for places in torch.arange(len(texts) * count).split(batch_size):
        row, column = places // count, places % count
        pictures.append(
            system.generate(
                tokens["input_ids"][row].to(device),
                tokens["attention_mask"][row].to(device),
                noise=noise[column.to(device)],
                averaged=averaged,
            )
            .float()
            .cpu()
        )
    together = torch.cat(pictures)
    return together.view(len(texts), count, *together.shape[1:])


def to_picture(values: Tensor) -> PIL.Image.Image:
    """[3, H, W] in [0, 1] as a picture."""
    return PIL.Image.fromarray((values.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


class DrawSamples(Callback):
    """Draws the same texts with the same noise while a system trains: RUN/samples/batch-0000500.png, a row a text.

    Args:
        every: batches between two drawings.
        texts: what to draw; when None the first captions, in the languages of evaluation, of the first 8 validation pictures.
        count: pictures a text.
        seed: of the noise.

    Raises:
        ValueError: a count below 1, a negative seed, no text or a blank one; in `setup`, a system that does not generate.
    """

    def __init__(
        self, every: int = 500, texts: Sequence[str] | None = None, count: int = 8, seed: int = 0
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        _check_drawing(["any"] if texts is None else texts, count, seed)
        self.every, self.texts, self.count, self.seed = every, texts, count, seed

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse before the training what could not be drawn in it."""
        _generating(pl_module.system)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Draw when it is time."""
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if done % self.every or not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        texts = self.texts
        if texts is None:
            part = next((name for name in data.val_splits if name in data.parts), data.train_split)
            _, captions = with_captions(data.samples(part), data.eval_languages, SkipReport())
            texts = [several[0] for several in captions[:8]]
        module: Any = pl_module
        pictures = draw(
            module.system,
            data.tokenizer,
            texts,
            max_length=data.max_length,
            count=self.count,
            seed=self.seed,
        )
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid = picture_grid(
            [to_picture(one) for one in pictures.flatten(0, 1)], columns=self.count, side=64, gap=4
        )
        save_image(grid, folder / f"batch-{done:07d}.png")


def _generating(system: object) -> XMCGAN:
    if not isinstance(system, XMCGAN):
        raise ValueError(f"system: {type(system).__name__} does not generate pictures; expected an XMCGAN")
    return system


def _check_drawing(texts: Sequence[str], count: int, seed: int) -> None:
    if not texts:
        raise ValueError("texts: expected at least one")
    for place, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"texts: expected words, got a blank text (number {place + 1})")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")


def _noise(seed: int, k: int, width: int) -> Tensor:
    # a stream of its own: how torch fills a tensor depends on the size of the whole
    (state,) = np.random.SeedSequence((seed, k)).generate_state(1, dtype=np.uint64)
    return torch.randn(width, generator=torch.Generator().manual_seed(int(state >> np.uint64(1))))
