"""Training of the demo: started, resumed after an interruption, or found finished."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from jrl.demo.files import read_json, write_json
from jrl.training.checkpoint import AtomicCheckpointIO
from jrl.training.command import run_command

RECORD = "demo.json"
CONFIGS = {"emoji": "clip_emoji.yaml", "scenes": "clip_scenes.yaml"}
# the last file of the exported system to be written
_EXPORTED = Path("model") / "preprocessing.json"
_LAST = Path("checkpoints") / "last.ckpt"
_OURS = ("checkpoints", "model", "config.yaml", "hparams.yaml", "events.out.tfevents.*", RECORD)

Say = Callable[[str], None]


@dataclass
class Record:
    """What a demo's folder holds, kept in its `demo.json`.

    Attributes:
        data: "emoji" or "scenes".
        why: why scenes rather than emoji; None when they were asked for, and for emoji.
        recipe: SHA-256 of the configuration file that training began with.
        changes: options of `jrl fit` given on top of it.
        training: what training took, once it is finished.
    """

    data: str
    why: str | None
    recipe: str
    changes: list[str]
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The record of a folder, None when it has none or training reached no checkpoint.

        Raises:
            ValueError: it cannot be read.
        """
        path = folder / RECORD
        try:
            values = read_json(path)
        except FileNotFoundError:
            return None
        if set(values) != {field.name for field in fields(cls)} or values["data"] not in CONFIGS:
            raise ValueError(f"{path}: not the record of a demo; --fresh starts over")
        record = cls(**values)
        finished = bool(record.training) and (folder / _EXPORTED).is_file()
        return record if finished or (folder / _LAST).is_file() else None

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        write_json(folder / RECORD, asdict(self))


class TrainingClock(Callback):
    """Counts the wall and processor seconds of training, over all its interruptions.

    Where there is no terminal for a progress bar, it also prints a line after each epoch.
    """

    def __init__(self) -> None:
        self._before = {"seconds": 0.0, "cpu_seconds": 0.0, "pieces": 0}
        self._start: tuple[float, float] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start to count."""
        self._start = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say how far it is."""
        if sys.stdout.isatty() or not trainer.is_global_zero:
            return
        loss = float(trainer.callback_metrics["loss"])
        seconds = self.state_dict()["seconds"]
        line = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: step {trainer.global_step}, "
        print(f"{line}loss {loss:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Seconds until now, and the number of uninterrupted pieces."""
        if self._start is None:
            return dict(self._before)
        wall, cpu = self._start
        return {
            "seconds": self._before["seconds"] + time.perf_counter() - wall,
            "cpu_seconds": self._before["cpu_seconds"] + time.process_time() - cpu,
            "pieces": self._before["pieces"] + 1,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint counted."""
        self._before = dict(state_dict)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop counting: evaluation and the report are not training."""
        self._before, self._start = self.state_dict(), None


def default_config(data: str) -> Path:
    """The recipe of a dataset, beside the package in a checkout.

    Raises:
        FileNotFoundError: the package was installed without the repository around it.
    """
    path = Path(__file__).parents[2] / "configs" / CONFIGS[data]
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such recipe; run in a checkout of the repository or pass --config"
        )
    return path


def clear(folder: Path, others: Sequence[str]) -> None:
    """Remove what the demo wrote into a folder, and nothing else.

    Args:
        folder: of the demo.
        others: names of the files of the report.
    """
    for pattern in (*_OURS, *others):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def train(folder: Path, record: Record, config: Path, say: Say) -> bool:
    """Train unless the folder holds the finished model; an interrupted training goes on where it stopped.

    Args:
        folder: of the run; holds `record` already when something was begun there.
        record: of this run; its `training` is filled in and saved.
        config: recipe of a new training; one that was begun keeps its own.
        say: takes each line of what is done.

    Returns:
        Whether anything was trained.

    Raises:
        KeyboardInterrupt: the user stopped it; the next call resumes.
        ValueError: the recipe, a change to it or the checkpoint is no good.
    """
    if record.training and (folder / _EXPORTED).is_file():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    record.training = {}
    record.save(folder)
    own = folder / "config.yaml"
    # what comes later wins, so a folder that was moved is still its own run
    here = ["--run", str(folder)]
    if (folder / _LAST).is_file() and own.is_file():
        step = AtomicCheckpointIO().load_checkpoint(folder / _LAST)["global_step"]
        say(f"resuming the interrupted training at step {step}")
        arguments = ["fit", "--config", str(own), *here, "--resume", "true"]
    else:
        # a training killed before its first checkpoint leaves the beginning of its curves
        clear(folder, [])
        record.save(folder)
        clock = f"--trainer.callbacks+={TrainingClock.__module__}.{TrainingClock.__qualname__}"
        arguments = ["fit", "--config", str(config), clock, *record.changes, *here]
        say(f"training; `tensorboard --logdir {folder}` shows the curves as they grow")
    try:
        command = run_command(arguments)
    except SystemExit as stopped:
        # Lightning ends the process with this status on Ctrl-C; the command line says so in its own way
        if stopped.code != 1:
            raise
        there = (folder / _LAST).is_file()
        say("interrupted; the same command " + ("goes on" if there else "starts over") + f" in {folder}")
        raise KeyboardInterrupt from None
    trainer: Any = command.trainer
    if not (folder / _EXPORTED).is_file():
        # killed between its last checkpoint and the export: Lightning then finds nothing left to train
        command.model.system.save_pretrained(folder / "model")
        command.datamodule.save_preprocessing(folder / "model")
    clocks = [callback for callback in trainer.callbacks if isinstance(callback, TrainingClock)]
    record.training = {
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "batch_size": command.datamodule.batch_size,
        "parameters": sum(parameter.numel() for parameter in command.model.system.parameters()),
        "device": str(trainer.strategy.root_device),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **(clocks[0].state_dict() if clocks else {}),
    }
    record.save(folder)
    return True


def digest(config: Path) -> str:
    """SHA-256 of a recipe."""
    return hashlib.sha256(config.read_bytes()).hexdigest()
