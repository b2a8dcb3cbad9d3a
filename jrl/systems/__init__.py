"""Systems: one file each, reading like the paper's figure."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

from jrl.systems.base import OptimizerSpec, System, Turn
from jrl.systems.clip import CLIP
from jrl.systems.critics import CriticOptions, LayerPair
from jrl.systems.group_vit import GroupViT
from jrl.systems.mutual_information import MutualInformation
from jrl.systems.xmc_gan import XMCGAN

__all__ = [
    "CLIP",
    "XMCGAN",
    "CriticOptions",
    "GroupViT",
    "LayerPair",
    "MutualInformation",
    "OptimizerSpec",
    "System",
    "Turn",
    "load_system",
]


def load_system(folder: str | Path, **kwargs: Any) -> System:
    """Load a saved system of whatever kind its `config.json` says.

    Args:
        folder: what `save_pretrained` wrote.
        kwargs: as `System.from_pretrained`.

    Raises:
        FileNotFoundError: the folder or its config is missing.
        ValueError: the config is unreadable, or names no system of this package.
    """
    path = Path(folder) / "config.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["system"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; expected a folder that save_pretrained wrote"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the config of a system: {error!r}") from error
    for module in pkgutil.iter_modules(__path__):
        kind = getattr(importlib.import_module(f"{__name__}.{module.name}"), str(name), None)
        if isinstance(kind, type) and issubclass(kind, System) and kind is not System:
            return kind.from_pretrained(folder, **kwargs)
    raise ValueError(f"{path}: no system is called {name!r}")
