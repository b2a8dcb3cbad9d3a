"""The mutual-information system from the command line: one side first, then both, and a run without what it came from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from jrl.cli import main
from jrl.training.command import run_at_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
ARGUMENTS = "--model.system.init_args."
DATA = {"train": 32, "val": 10, "test": 2, "size": 32}
Fit = Callable[..., None]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """`jrl fit` with the shipped configuration on a few small scenes, narrow and for two epochs."""
    few = [
        "--trainer.max_epochs",
        "2",
        "--trainer.check_val_every_n_epoch",
        "1",
        "--trainer.accelerator",
        "cpu",
    ]
    few += ["--trainer.enable_progress_bar", "false", "--data.batch_size", "16", "--data.image_size", "32"]
    few += [text for name, value in DATA.items() for text in (f"--data.options.{name}", str(value))]
    few += [f"{ARGUMENTS}image_encoder.init_args.model.hidden_sizes", "[16, 32]"]
    few += [f"{ARGUMENTS}text_encoder.init_args.model.hidden_size", "32"]
    few += [f"{ARGUMENTS}text_encoder.init_args.model.intermediate_size", "32"]

    def run(name: str, *more: str, config: Path = CONFIGS / "mutual_information_scenes.yaml") -> None:
        arguments = ["fit", "--traceback", "--config", str(config), "--run", str(tmp_path / name)]
        assert main([*arguments, *few, *more]) == 0

    return run


def alone(side: str) -> list[str]:
    """Options of a run that trains one side without the other."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "image": ("DeepInfoMax", {"local_width": 32, "global_width": 32, "units": 16}),
        "text": (
            "MaskedWords",
            {"width": 32, "vocab_size": 512, "mask_token_id": 4, "special_token_ids": [0, 1, 2, 3]},
        ),
    }
    name, options = kinds[side]
    objective = f"{ARGUMENTS}{side}_objective"
    more = [text for key, value in options.items() for text in (f"{objective}.init_args.{key}", str(value))]
    return [f"{ARGUMENTS}joint_weight", "0", objective, f"jrl.objectives.{name}", *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("side", ["image", "text"])
def test_one_side_first_and_then_both(fit: Fit, tmp_path: Path, side: str) -> None:
    fit("first", *alone(side))
    other = "text" if side == "image" else "image"
    fit("second", f"{ARGUMENTS}{side}_weights", str(tmp_path / "first"), f"{ARGUMENTS}freeze", f"[{side}]")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    kept = {name for name in first if name.startswith(f"{side}_encoder.")}
    assert kept and all(torch.equal(first[name], second[name]) for name in kept)
    assert any(
        not torch.equal(value, second[name]) for name, value in first.items() if name.startswith(other)
    )
    # the run stands by itself
    shutil.rmtree(tmp_path / "first")
    saved = tmp_path / "second" / "config.yaml"
    assert main(["validate", "--traceback", "--config", str(saved), "--run", str(tmp_path / "second")]) == 0
    fit("second", "--resume", "true", "--trainer.max_epochs", "3", config=saved)
    shutil.rmtree(tmp_path / "second" / "model")
    run_at_checkpoint(tmp_path / "second", "last")
    # where the weights came from stays on record
    system = yaml.safe_load(saved.read_text(encoding="utf-8"))["model"]["system"]
    assert system["init_args"][f"{side}_weights"] == str(tmp_path / "first")
    with pytest.raises(FileNotFoundError, match="no such folder; expected a run or a saved system"):
        fit("third", config=saved)
