"""The compiled module `jrl_kernels._C`: loaded on first use; when it is missing, says why and what to do."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).parent
_REBUILD = "pip install -e ."

_module: ModuleType | None = None


def get() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it is missing or cannot be loaded; the message says why and names the command that fixes it.
    """
    if _module is None:
        missing = unavailable()
        if missing is not None:
            raise ImportError(f"jrl_kernels has no compiled extension: {missing[0]}. To fix: {missing[1]}")
    assert _module is not None
    return _module


def launch(name: str, *args: Any) -> None:
    """Run a launcher: addresses, integers, booleans and floats in the order of its C++ signature.

    Raises:
        ImportError: there is no compiled extension.
        TypeError, ValueError: the wrong name, number or kind of arguments.
        RuntimeError: the launcher reported an error.
    """
    (_module or get()).launch(name, *args)


def launch_cuda(name: str, device: Any, *args: Any) -> None:
    """Run a CUDA launcher, whose last parameter is a stream, on the current stream of a torch device; errors as `launch`."""
    import torch

    with torch.cuda.device(device):
        launch(name, *args, torch.cuda.current_stream(device).cuda_stream)


def pointer(tensor: Any, offset: int = 0) -> int:
    """The address of a tensor's element `offset` counted in memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr() + offset * tensor.element_size()


def available(launcher: str | None = None) -> bool:
    """Whether the extension can be loaded and, with a name, contains that launcher."""
    return unavailable(launcher) is None


def why_missing(launcher: str | None = None) -> str | None:
    """Why the extension, or one launcher of it, is not there; None when it is."""
    missing = unavailable(launcher)
    return None if missing is None else missing[0]


@functools.cache
def unavailable(launcher: str | None = None) -> tuple[str, str] | None:
    """Why the extension, or one launcher of it, is not there and the command that fixes it; None when it is there."""
    missing = _load()
    if missing is not None or launcher is None:
        return missing
    assert _module is not None
    if launcher in _module.launchers():
        return None
    skipped = build_info()["cuda"]["skipped"] if launcher.endswith("_cuda") else None
    if skipped is not None:
        return f"{launcher} was not compiled: {skipped['reason']}", skipped["fix"]
    return f"the compiled extension does not contain {launcher}: it is older than the sources", _REBUILD


def build_info() -> dict[str, Any]:
    """What was compiled, with what, and why the rest was not; empty when nothing was ever built."""
    if _load() is None:
        assert _module is not None
        return dict(_module.build_info())
    path = _HERE / "_build_info.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


@functools.cache
def _load() -> tuple[str, str] | None:
    """Load the module once; a failure is remembered, since a build takes effect in the next process."""
    global _module
    try:
        # torch first: its OpenMP runtime then serves the extension too, instead of a second pool of threads.
        importlib.import_module("torch")
        _module = importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        if importlib.util.find_spec(f"{__package__}._C") is not None:
            return f"{__package__}._C was built but does not load ({error})", _REBUILD
        return _why_not_built()
    return None


def _why_not_built() -> tuple[str, str]:
    others = sorted(path.name for path in _HERE.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if others:
        return f"it was built for another Python ({', '.join(others)})", _REBUILD
    path = _HERE / "_build_info.json"
    if path.is_file():
        skipped = json.loads(path.read_text(encoding="utf-8"))["skipped"]
        if skipped is not None:
            return f"it was skipped when the package was built: {skipped['reason']}", skipped["fix"]
    return "it has not been built", _REBUILD
