"""What every system shares: saving, loading and the declaration of its optimisers."""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn

from jrl.encoders import EncoderOutput

S = TypeVar("S", bound="System")

WEIGHTS, CONFIG, PICKLED = "model.safetensors", "config.json", "pytorch_model.bin"


@dataclass
class OptimizerSpec:
    """One optimiser that a system asks for; `jrl.training` carries it out.

    Attributes:
        parameters: what it updates.
        losses: names of the losses whose sum it minimises; None for all of them.
        lr_factor: its learning rate as a multiple of the run's.
        weight_decay: None for the run's.
    """

    parameters: Iterable[nn.Parameter]
    losses: tuple[str, ...] | None = None
    lr_factor: float = 1.0
    weight_decay: float | None = None


@dataclass
class Turn:
    """One forward pass of a batch, or of a part of it, and the optimisers that step on its losses.

    Attributes:
        batch: what `System.forward` gets.
        optimizers: places in `System.optimization()`; they share the pass, and each steps on the gradients of its own losses
            alone. Parameters of the others do not require gradients meanwhile.
    """

    batch: dict[str, Any]
    optimizers: tuple[int, ...]


class System(nn.Module, PyTorchModelHubMixin, library_name="jrl", license="apache-2.0"):
    """Base of every system: its named losses are summed and optimised, its weights are safetensors."""

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Named 0-d losses, and named detached 0-d tensors worth plotting."""

    @abstractmethod
    def encode_image(self, pixel_values: Tensor) -> EncoderOutput:
        """Pictures to the joint space."""

    @abstractmethod
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        """Texts to the joint space."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Arguments of `from_config`, in JSON types."""

    @classmethod
    def from_config(cls: type[S], config: dict[str, Any]) -> S:
        """Build the system that `to_config` describes, with fresh weights.

        Raises:
            ValueError: a part is missing or does not fit.
        """
        try:
            return cls._assemble(dict(config))
        except KeyError as error:
            raise ValueError(f"config: has no {error.args[0]!r}") from error
        except TypeError as error:
            raise ValueError(f"config: {error}") from error

    @classmethod
    @abstractmethod
    def _assemble(cls: type[S], config: dict[str, Any]) -> S:
        """What `from_config` returns, from a copy of its config; a KeyError or TypeError says what is wrong with that."""

    def optimization(self) -> list[OptimizerSpec]:
        """Optimisers of the system; one over all parameters and all losses unless a system says otherwise."""
        return [OptimizerSpec(self.parameters())]

    def turns(self, batch: dict[str, Any]) -> list[Turn]:
        """How a batch trains several optimisers: each has a pass of its own over all of it unless a system says otherwise."""
        return [Turn(batch, (place,)) for place in range(len(self.optimization()))]

    @property
    def image_trunk(self) -> nn.Module:
        """Pictures to an `EncoderOutput`, without what joins them to texts: what heads of other tasks look through.

        The system itself, by its `encode_image`, where that has no such part.
        """
        return self

    @property
    def idle(self) -> str | None:
        """Weights that are trained but get no gradient in any step, in words; None when there are none. DDP waits for such."""
        return None

    @property
    def steps_per_batch(self) -> int:
        """Steps of all optimisers that one batch makes."""
        return len(self.optimization())

    def after_turn(self, turn: Turn) -> None:
        """What follows the optimisers' steps, such as an update of averaged weights; nothing unless a system says otherwise."""

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write `model.safetensors`, `config.json` and a model card into a folder.

        Everything is written aside and renamed into place, so a failure leaves what was there before.

        Args:
            save_directory: the folder; made when missing.
            kwargs: as `PyTorchModelHubMixin.save_pretrained`.

        Raises:
            OSError: the folder cannot be written (a full disk, no permission).
            TypeError: an encoder has no config to write.
        """
        target = Path(save_directory)
        config = kwargs.pop("config", None) or {"system": type(self).__name__, **self.to_config()}
        aside = target.with_name(f".{target.name}.writing")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # a killed process may have left one
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            result = super().save_pretrained(aside, config=config, **kwargs)
            target.mkdir(exist_ok=True)
            # safetensors makes files that their owner alone can read; `config.json` has the mode that the user's umask gives
            (aside / WEIGHTS).chmod((aside / CONFIG).stat().st_mode)
            for file in sorted(aside.iterdir()):
                os.replace(file, target / file.name)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{target}: the system could not be saved: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return result

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[S],
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        allow_pickle: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
    ) -> S:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a local folder, or a repository of the model hub.
            map_location: where the weights go.
            strict: raise when a weight is missing or unknown.
            allow_pickle: take `pytorch_model.bin` where there are no safetensors weights.
            local_files_only, revision, cache_dir, force_download, token: for the hub.

        Raises:
            FileNotFoundError: the folder, its config or its weights are missing.
            ValueError: the config or the weights are unreadable or do not fit, or are pickled.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            if local_files_only or folder.is_absolute() or len(folder.parts) != 2:
                raise FileNotFoundError(f"{folder}: no such folder")
            folder = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path),
                    allow_patterns=[WEIGHTS, CONFIG, *([PICKLED] if allow_pickle else [])],
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                )
            )
        system = cls.from_config(_read_config(folder, cls.__name__))
        _load_state(system, _read_weights(folder, allow_pickle), folder, strict)
        return system.to(map_location).eval()


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder}: no {CONFIG}; expected a folder that save_pretrained wrote"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a JSON config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    system = config.pop("system", None)
    if system != name:
        raise ValueError(f"{path}: expected the config of a {name}, got that of {system or 'something else'}")
    return config


def _read_weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if path.is_file():
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: unreadable or truncated weights: {error}") from error
    pickled = folder / PICKLED
    if not pickled.is_file():
        raise FileNotFoundError(f"{folder}: no {WEIGHTS}")
    if not allow_pickle:
        raise ValueError(
            f"{pickled}: pickled weights are read only with allow_pickle=True; expected {WEIGHTS}"
        )
    try:
        state = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{pickled}: unreadable weights: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{pickled}: expected a state dict, got {type(state).__name__}")
    return state


def _load_state(system: nn.Module, state: dict[str, Tensor], folder: Path, strict: bool) -> None:
    own = system.state_dict()
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{folder}: the weights do not fit the config: {_some(wrong)}")
    # parts may fill in what weights of their older kind lack
    found = system.load_state_dict(state, strict=False)
    # tied weights are stored once: a missing name is fine when its tensor is stored under another
    stored = {own[name].data_ptr() for name in own if name in state}
    missing = sorted(name for name in found.missing_keys if own[name].data_ptr() not in stored)
    if strict and (missing or found.unexpected_keys):
        problems = [f"{name} is missing" for name in missing]
        problems += [f"{name} is unknown" for name in sorted(found.unexpected_keys)]
        raise ValueError(f"{folder}: the weights do not fit the config: {_some(problems)}")


def _some(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
