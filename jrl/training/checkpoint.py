"""Checkpoints that appear whole or not at all, and the export of the trained system."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

LAST, BEST = "last.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside, flushes it to the disk and renames it; reads tensors and plain values only.

    A checkpoint is a pickle, but it is always read with `weights_only=True`: it can run no code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written (a full disk, no permission); what was at `path` is still there.
            TypeError: `storage_options` is given.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options: expected None, got {type(storage_options).__name__}")
        target = Path(path)
        aside = target.with_name(f".{target.name}.writing")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        # torch's writer reports a failed write as a RuntimeError
        except (OSError, RuntimeError) as error:
            free = (
                f"; {shutil.disk_usage(target.parent).free >> 20} MiB are free there"
                if target.parent.is_dir()
                else ""
            )
            raise OSError(f"{target}: the checkpoint could not be saved: {error}{free}") from error
        finally:
            aside.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint that this class wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is unreadable, truncated, no checkpoint, or asks for more than tensors and plain
                values (also when `weights_only` is False).
        """
        if weights_only is False:
            raise ValueError(
                f"weights_only: {path} is read as tensors and plain values only, got weights_only=False"
            )
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such checkpoint")
        try:
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{file}: unreadable or truncated checkpoint: {reason}") from error
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError(f"{file}: not a training checkpoint")
        return checkpoint


class LastCheckpoint(Checkpoint):
    """The newest checkpoint of a run: every so many steps or at the end of every epoch, and at the end of the training.

    Several optimisers make several steps a batch: it is written after the batch in which one was due.

    Args:
        path: of the file, which the next one replaces.
        every: steps between two; the end of an epoch when None.

    Attributes:
        best_model_path: `path`, by the name that Lightning knows.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, path: str | Path, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"checkpoint_every: expected at least 1, got {every}")
        self.best_model_path, self.every = str(path), every
        self._saved = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """What a resumed run begins with is saved."""
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, *rest: Any) -> None:
        """Save where one of the batch's steps was due."""
        if self.every is not None and trainer.global_step // self.every > self._saved // self.every:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save where epochs are counted."""
        if self.every is None:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what came after the last one."""
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step != self._saved:
            trainer.save_checkpoint(self.best_model_path)
            self._saved = trainer.global_step


class ExportSystem(Callback):
    """Writes the system, its tokenizer and its image preprocessing to a folder that `jrl retrieve` reads.

    Args:
        folder: where to.
        monitor: export whenever this logged value improves; at the end of training when None.
        mode: "max" or "min".
    """

    def __init__(self, folder: str | Path, monitor: str | None = None, mode: str = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode: expected 'max' or 'min', got {mode!r}")
        self.folder, self.monitor, self.mode = Path(folder), monitor, mode
        self.best: float | None = None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Export if the monitored value improved."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"monitor: validation logs no {self.monitor!r}; it logs {known}")
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if self.best is None or sign * value > sign * self.best:
            self.best = value
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Export the last weights when no validation chose others.

        Unlike the end of training, this also comes when a resumed run finds nothing left to train, as after a kill
        between the last checkpoint and the export.
        """
        if self.monitor is None or self.best is None:
            self._export(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value of a resumed run."""
        self.best = state_dict["best"]

    def _export(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        pl_module.system.save_pretrained(self.folder)
        save_preprocessing = getattr(getattr(trainer, "datamodule", None), "save_preprocessing", None)
        if save_preprocessing is not None:
            save_preprocessing(self.folder)


def checkpoint_callbacks(
    run: str | Path, *, every: int | None, monitor: str | None, mode: str = "max"
) -> list[Callback]:
    """The callbacks of a run: last and best checkpoint, and the export.

    Args:
        run: folder of the run; checkpoints go to `checkpoints`, the system to `model`.
        every: steps between two writes of the last checkpoint; the end of an epoch when None. The end of the training is always
            written.
        monitor: logged value that decides what is best; no best one is kept when None.
        mode: "max" or "min".
    """
    folder = Path(run) / "checkpoints"
    last = LastCheckpoint(folder / LAST, every)
    callbacks: list[Callback] = [last, ExportSystem(Path(run) / "model", monitor, mode)]
    if monitor is not None:
        best = ModelCheckpoint(
            dirpath=folder, filename=Path(BEST).stem, monitor=monitor, mode=mode, enable_version_counter=False
        )
        callbacks.append(best)
    return callbacks
