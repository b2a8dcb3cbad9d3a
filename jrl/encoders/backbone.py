"""A transformers model from an object, a config or a local path."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)

# the dict comes first: a command line tries the types in order, and a config would swallow any dict
Backbone: TypeAlias = dict[str, Any] | str | Path | PretrainedConfig | PreTrainedModel


def build_backbone(
    model: Backbone,
    *,
    argument: str,
    with_pooler: bool,
    classifier: bool = False,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """Build the trunk of an encoder.

    Args:
        model: a transformers model (used as it is), a config, the dict of a config (with `model_type`), or
            the path of a local folder that `save_pretrained` wrote: that of a transformers model, or that of a
            system (RUN/model), whose encoder of the name `argument` is taken with its weights.
        argument: how the caller names `model` in error messages.
        with_pooler: keep the trunk's own pooling layer; without it the trunk has no unused parameters.
        classifier: an image classifier with its head, not a trunk alone.
        allow_pickle: let a folder without safetensors weights be read from its pickled ones.

    Returns:
        The model; nothing is fetched from a network.

    Raises:
        TypeError: `model` is none of the above.
        ValueError: the dict names no architecture that transformers knows.
        FileNotFoundError: the folder, its config or its safetensors weights are missing.
        OSError: the weights cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if isinstance(model, (str, Path)):
        return _from_folder(Path(model), argument, with_pooler, classifier, allow_pickle)
    if isinstance(model, dict):
        model = config_from_dict(model, argument)
    if not isinstance(model, PretrainedConfig):
        raise TypeError(
            f"{argument}: expected a transformers model, config, dict or path, got {type(model).__name__}"
        )
    if type(model) not in (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if classifier else MODEL_MAPPING):
        kind = "image classifier" if classifier else "encoder"
        raise ValueError(f"{argument}: transformers has no {kind} for {type(model).__name__}")
    if classifier:
        return AutoModelForImageClassification.from_config(model)
    return AutoModel.from_config(model, **_pooler_option(model, with_pooler))


def config_from_dict(values: dict[str, Any], argument: str) -> PretrainedConfig:
    """The transformers config that a dict with a `model_type` describes.

    Raises:
        ValueError: `model_type` is missing or unknown, or a value does not fit.
    """
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"{argument}: expected a 'model_type' such as 'vit' or 'bert', got {sorted(values)}")
    try:
        config = AutoConfig.for_model(model_type, **values)
    # the configs validate themselves, with an exception of their own
    except Exception as error:
        raise ValueError(f"{argument}: no config for model_type {model_type!r}: {error}") from error
    known = set(type(config)().to_dict()) | set(config.attribute_map)
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{argument}: {type(config).__name__} has no {', '.join(unknown)}")
    return config


def config_to_dict(model: nn.Module) -> dict[str, Any]:
    """What `config_from_dict` needs to build `model` again, in JSON types.

    Raises:
        TypeError: `model` has no transformers config.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"model: {type(model).__name__} has no transformers config to write to config.json")
    values = json.loads(config.to_json_string(use_diff=True))
    values["model_type"] = config.model_type
    for key in ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path"):
        values.pop(key, None)
    return values


def _pooler_option(config: PretrainedConfig, with_pooler: bool) -> dict[str, Any]:
    entry: Any = MODEL_MAPPING.get(type(config), None)
    model_class = entry[0] if isinstance(entry, (tuple, list)) else entry
    if model_class is None or "add_pooling_layer" not in inspect.signature(model_class.__init__).parameters:
        return {}
    return {"add_pooling_layer": with_pooler}


def _from_folder(
    path: Path, argument: str, with_pooler: bool, classifier: bool, allow_pickle: bool
) -> PreTrainedModel:
    if not path.is_dir():
        raise FileNotFoundError(f"{argument}: no folder {path}")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{argument}: {path} has no config.json")
    system = _system_config(path, argument)
    if system is not None:
        return _from_system(path, system, argument, with_pooler, classifier)
    has_safetensors = any(path.glob("*.safetensors"))
    if not has_safetensors and not allow_pickle:
        raise FileNotFoundError(
            f"{argument}: {path} has no safetensors weights; pickled ones need allow_pickle=True"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        return (AutoModelForImageClassification if classifier else AutoModel).from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=has_safetensors,
            **({} if classifier else _pooler_option(config, with_pooler)),
        )
    except Exception as error:
        raise OSError(f"{argument}: cannot read a model from {path}: {error}") from error


def _system_config(path: Path, argument: str) -> dict[str, Any] | None:
    """The config in a system's folder; None in that of a transformers model."""
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OSError(f"{argument}: cannot read a model from {path}: {error}") from error
    return values if isinstance(values, dict) and "system" in values else None


def _from_system(
    path: Path, config: dict[str, Any], argument: str, with_pooler: bool, classifier: bool
) -> PreTrainedModel:
    part = config.get(argument)
    if not isinstance(part, dict) or not isinstance(part.get("model"), dict):
        raise OSError(f"{argument}: the {config['system']} in {path} has no {argument}")
    model = build_backbone(part["model"], argument=argument, with_pooler=with_pooler, classifier=classifier)
    prefix = f"{argument}.model."
    try:
        with safe_open(path / "model.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            model.load_state_dict({name.removeprefix(prefix): file.get_tensor(name) for name in names})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{argument}: cannot read its weights from {path}: {reason}") from error
    return model
