"""Stops a run that has failed, before what it has become replaces its last good checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

_ALIKE = 1e-6
"""Spread of pictures in [0, 1] below which they count as equal."""


class TrainingWatch(Callback):
    """Stops when a loss or a weight is not finite, or when generated pictures have become alike.

    How much pictures differ is their standard deviation over the batch, averaged over pixels and channels; a system that
    generates reports it as "spread", and that of the real pictures as "spread_real". A run has collapsed where the running
    average of their ratio is below `collapse`.

    Both are judged while training, before every checkpoint and at the end: nothing is written in a bad state, so the last
    checkpoint is good. A batch whose real pictures are alike themselves, as one pair is, says nothing of a collapse.

    Args:
        collapse: the smallest ratio of the generated pictures' spread to the real ones'; 0 never stops.
        after: batches until the ratio is judged.
        decay: of its running average, a batch.
        every: batches between two looks where a look waits for an accelerator or for other ranks; on one CPU each is looked at.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self, collapse: float = 0.05, after: int = 100, decay: float = 0.95, every: int = 10
    ) -> None:
        if not 0 <= collapse < 1:
            raise ValueError(f"collapse: expected a share in [0, 1), got {collapse}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a value in [0, 1), got {decay}")
        if after < 0 or every < 1:
            raise ValueError(f"after, every: expected at least 0 and 1 batches, got {after} and {every}")
        self.collapse, self.after, self.decay, self.every = collapse, after, decay, every
        self._losses: dict[str, Tensor] = {}
        self._ratio: Tensor | None = None
        self._saved_step: int | None = None

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in what the batch gave, and look at it when it is time."""
        module: Any = pl_module
        for name, loss in module.losses.items():
            kept = self._losses.get(name, loss)
            # the first value that is not finite stays until the next look
            self._losses[name] = torch.where(kept.isfinite(), loss, kept)
        spread, real = (module.plots.get(name) for name in ("spread", "spread_real"))
        if spread is not None and real is not None:
            ratio = spread.float() / real.float()
            # infinite until the first batch that says something: no ratio is below another, and no wait for an accelerator
            before = ratio.new_tensor(torch.inf) if self._ratio is None else self._ratio.to(ratio)
            mean = torch.where(before.isfinite(), before.lerp(ratio, 1 - self.decay), ratio)
            self._ratio = torch.where(real < _ALIKE, before, mean)
        waits = pl_module.device.type != "cpu" or trainer.world_size > 1
        if not waits or (_batches(trainer) + 1) % self.every == 0:
            self._look(trainer)

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Let no checkpoint of a failed run be written."""
        self._look(trainer)
        self._check_weights(trainer, checkpoint.get("state_dict", {}))
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let no failed run end as if it had not, and export what it has become."""
        self._look(trainer)
        self._check_weights(trainer, pl_module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The running average of the ratio."""
        return {"ratio": None if self._ratio is None else float(self._ratio)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the running average of a resumed run."""
        ratio = state_dict["ratio"]
        self._ratio = None if ratio is None else torch.tensor(ratio)

    def _look(self, trainer: lightning.Trainer) -> None:
        """Raise where the run has failed; all ranks see the same, and so stop together."""
        if not self._losses:
            return
        losses = torch.stack([loss.float() for loss in self._losses.values()])
        ratio = losses.new_tensor(torch.inf) if self._ratio is None else self._ratio.to(losses)
        # a mean over the ranks is finite only where every one is
        seen = trainer.strategy.reduce(torch.cat([losses, ratio[None]]), reduce_op="mean").tolist()
        for name, value in zip(self._losses, seen, strict=False):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"loss {name!r} is {value} at step {trainer.global_step}; "
                    f"lower lr, or look for NaN in the data; {self._last_good(trainer)}"
                )
        if seen[-1] < self.collapse and _batches(trainer) >= self.after:
            raise FloatingPointError(
                f"the generated pictures have become alike at step {trainer.global_step}: their spread is {seen[-1]:.2g} of "
                f"that of the real ones, less than `collapse` {self.collapse}; lower lr, or take another seed; "
                f"{self._last_good(trainer)}"
            )

    def _check_weights(self, trainer: lightning.Trainer, weights: Mapping[str, Tensor]) -> None:
        broken = [
            name
            for name, value in weights.items()
            if value.is_floating_point() and not value.isfinite().all()
        ]
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise FloatingPointError(
                f"weights {broken[0]!r}{more} are not finite at step {trainer.global_step}; "
                f"lower lr; {self._last_good(trainer)}"
            )

    def _last_good(self, trainer: lightning.Trainer) -> str:
        kept = [getattr(callback, "best_model_path", None) for callback in trainer.checkpoint_callbacks]
        path = next((path for path in kept if path and Path(path).is_file()), None)
        if path is None:
            return "no checkpoint has been written yet"
        step = "" if self._saved_step is None else f", of step {self._saved_step}"
        return f"the last good checkpoint is {path}{step}"


def _batches(trainer: lightning.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.total_batch_idx
