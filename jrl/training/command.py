"""`jrl fit|validate|test`: LightningCLI with a folder for the run."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from jrl.data.tokenizer import load_tokenizer
from jrl.evaluation import to_markdown
from jrl.training.checkpoint import BEST, LAST, AtomicCheckpointIO, checkpoint_callbacks
from jrl.training.data import CaptionDataModule
from jrl.training.files import check_folder, write_atomically
from jrl.training.module import SystemModule
from jrl.training.run import Run, usable_device

_FIRST_WEIGHTS = ("image_weights", "text_weights")
_NOISE = (
    "LightningCLI's args parameter",  # the arguments come from `main`, which takes its own off first
    ".*isinstance.treespec, LeafSpec.* is deprecated",
    "Checkpoint directory .* exists and is not empty",  # `--overwrite` and `--resume` are asked for by name
    "Be aware that when using `ckpt_path`",  # evaluation needs no callback that writes
    r"Found .* module\(s\) in eval mode",  # frozen and averaged parts are, and the rest begins to train after that
)


class TrainingCLI(LightningCLI):
    """LightningCLI whose checkpoints, logs and exported system live under `--run`."""

    _first_weights: Mapping[str, Any] = MappingProxyType({})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run adds to Lightning's arguments."""
        parser.add_argument("--run", type=str, required=True, help="folder of the run")
        parser.add_argument(
            "--resume", type=bool, default=False, help="fit: go on from the run's last checkpoint"
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="fit: start anew where a run lies already"
        )
        parser.add_argument(
            "--monitor", type=str | None, default=None, help="value that chooses the best weights"
        )
        parser.add_argument("--monitor_mode", type=str, default="max", help="max or min")
        parser.add_argument(
            "--checkpoint_every", type=int | None, default=None, help="steps between checkpoints"
        )

    def before_instantiate_classes(self) -> None:
        """Choose the checkpoint before anything slow begins."""
        config = self.config[self.subcommand]
        run = Path(config["run"])
        folder = run / "checkpoints"
        last = folder / LAST
        if self.subcommand == "fit":
            if config["resume"] and config["overwrite"]:
                raise ValueError("resume, overwrite: choose one")
            if config["resume"]:
                if not last.is_file():
                    raise FileNotFoundError(f"resume: {run} has no checkpoint to go on from ({last})")
                config["ckpt_path"] = str(last)
            elif config["ckpt_path"] is None:
                check_folder("run", run)
                holds = [path for path in (last, folder / BEST, run / "model") if path.exists()]
                if holds and not config["overwrite"]:
                    resume = "--resume true, " if last.exists() else ""
                    raise ValueError(
                        f"run: {run} holds a run; pass {resume}--overwrite true or another folder"
                    )
                # curves without a checkpoint are of a training that was refused or stopped before its first
                for old in (last, folder / BEST, *run.glob("events.out.tfevents.*")):
                    old.unlink(missing_ok=True)
                shutil.rmtree(run / "model", ignore_errors=True)
        elif config["ckpt_path"] is None:
            best = folder / BEST
            chosen = best if best.is_file() else last
            if not chosen.is_file():
                raise FileNotFoundError(f"run: {run} has no checkpoint ({last})")
            config["ckpt_path"] = str(chosen)
        if config["ckpt_path"] is not None:
            self._first_weights = _take_first_weights(config["model"])

    def after_fit(self) -> None:
        """Say where the run is."""
        config = self.config["fit"]
        run = config["run"]
        if self.trainer.is_global_zero and not config["trainer"]["fast_dev_run"]:
            print(f"saved {run}; to evaluate it: jrl test --config {run}/config.yaml --run {run}")

    def after_validate(self) -> None:
        """Show and keep the results."""
        self._keep_results("validate")

    def after_test(self) -> None:
        """Show and keep the results."""
        self._keep_results("test")

    def _keep_results(self, name: str) -> None:
        if not self.trainer.is_global_zero:
            return
        results, run = self.model.results, Path(self.config[name]["run"])
        table = to_markdown(results)
        print(table)
        write_atomically(run / f"{name}.md", f"{table}\n".encode())
        write_atomically(run / f"{name}.json", json.dumps(results, indent=2).encode())

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer with the run's callbacks, logger and checkpoint writer where none are given."""
        assert self.subcommand is not None
        config = self.config_init[self.subcommand]
        given, run = config["trainer"], config["run"]
        kwargs["default_root_dir"] = run
        callbacks = list(given.get("callbacks") or [])
        if self.subcommand == "fit" and not given.get("fast_dev_run"):
            callbacks += checkpoint_callbacks(
                run, every=config["checkpoint_every"], monitor=config["monitor"], mode=config["monitor_mode"]
            )
        if given.get("enable_progress_bar") is not False:
            callbacks.append(RichProgressBar())
        kwargs["callbacks"] = callbacks
        plugins = given.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if given.get("logger") in (None, True):
            # nothing of a run may land outside its folder, hence no version folders
            kwargs["logger"] = (
                TensorBoardLogger(save_dir=run, name="", version="") if self.subcommand == "fit" else False
            )
        # the saved config describes the run, not this command: it must neither overwrite nor resume by itself
        for name, value in (("resume", False), ("overwrite", False), ("ckpt_path", None)):
            self.config[self.subcommand][name] = value
        for name, folder in self._first_weights.items():
            self.config[self.subcommand]["model"]["system"]["init_args"][name] = folder
        return super().instantiate_trainer(**kwargs)


def run_command(arguments: Sequence[str]) -> TrainingCLI:
    """Carry out `fit`, `validate` or `test`.

    Args:
        arguments: the subcommand and its options.
    """
    once: dict[str, Any] = {"exit_on_error": False}
    # what Lightning says at this level is advice about its other products
    logging.getLogger("lightning").setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message)
        return TrainingCLI(
            SystemModule,
            CaptionDataModule,
            args=list(arguments),
            seed_everything_default=0,
            # the system declares its optimisers, so options for others would be accepted and ignored
            auto_configure_optimizers=False,
            # the config of an evaluation must not replace that of the training
            save_config_callback=SaveConfigCallback if arguments[0] == "fit" else None,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "jrl", **once, "fit": once, "validate": once, "test": once},
        )


def data_module_of(run: str | Path) -> CaptionDataModule:
    """The data module that a run was trained with, from its `config.yaml`.

    Raises:
        FileNotFoundError: the run has none.
        ValueError: it cannot be read.
    """
    data: CaptionDataModule = _part_of_config(run, "data", CaptionDataModule)
    return data


def run_at_checkpoint(run: str | Path, checkpoint: str | Path, *, device: str | torch.device = "cpu") -> Run:
    """A run with the weights of one of its checkpoints, also while it still trains and has exported no system.

    Args:
        run: folder of the run.
        checkpoint: a file, or the name of one in the run's `checkpoints`, such as "last".
        device: where the system goes.

    Raises:
        FileNotFoundError: there is no such checkpoint, or the run has no `config.yaml`.
        ValueError: a file is unreadable, the weights are not this run's, or there is no such device.
    """
    folder, device = Path(run), usable_device(device)
    found = [Path(checkpoint), *(folder / "checkpoints" / f"{checkpoint}{end}" for end in ("", ".ckpt"))]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"checkpoint: neither {found[0]} nor {found[-1]} is a file")
    state = AtomicCheckpointIO().load_checkpoint(path)["state_dict"]
    if (folder / "model" / "config.json").is_file():
        opened = Run.load(folder)
    else:
        data = data_module_of(folder)
        if data.tokenizer_path is None:
            data.setup("predict")
        tokenizer = data.tokenizer or load_tokenizer(str(data.tokenizer_path))
        module: SystemModule = _part_of_config(folder, "model", SystemModule)
        opened = Run(module.system, tokenizer, data.transform, data.max_length, data.padding)
    try:
        opened.system.load_state_dict({name.removeprefix("system."): value for name, value in state.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 200 else f"{reason[:200]} …"
        raise ValueError(f"checkpoint: {path} does not hold the weights of {folder}: {reason}") from error
    opened.system.to(device).eval()
    return opened


def _part_of_config(run: str | Path, name: str, kind: type) -> Any:
    from jsonargparse import ArgumentError, ArgumentParser

    path = Path(run) / "config.yaml"
    if not path.is_file():
        hint = ", or name the pictures with --images" if name == "data" else ""
        raise FileNotFoundError(f"{path}: no such file; expected a folder that `jrl fit` wrote{hint}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, name)
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if name == "model":
            _take_first_weights(values[name])
        return parser.instantiate_classes(parser.parse_object({name: values[name]}))[name]
    except (ArgumentError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the config of a run: {error}") from error


def _take_first_weights(model: Any) -> dict[str, Any]:
    """Take from the arguments of a `SystemModule` the folders that its system started from, which may be gone since.

    For a system whose weights come from a checkpoint.

    Returns:
        What was taken, by its name.
    """
    arguments = model["system"].get("init_args") or {}
    taken = {name: arguments.get(name) for name in _FIRST_WEIGHTS if arguments.get(name) is not None}
    for name in taken:
        arguments[name] = None
    return taken
