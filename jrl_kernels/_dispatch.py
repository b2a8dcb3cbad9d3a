"""Choosing the implementation of an op: a name asked for, or the fastest that supports the inputs."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from . import _extension

Refusal = tuple[str, str]
"""Why a backend cannot serve, and the command or change that would let it."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: "reference", "cpu", "triton" or "cuda".
        module: full name of the Python module that implements it; imported on first use.
        unavailable: why this machine cannot run it, or None.
        declines: why it does not take tensors of (device type, dtype), or None.
    """

    name: str
    module: str
    unavailable: Callable[[], Refusal | None]
    declines: Callable[[str, torch.dtype], str | None]

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


Backends = Mapping[str, Backend]

_TABLES: dict[str, Backends] = {}

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def table(op: str, *backends: Backend) -> dict[str, Backend]:
    """Declare the backends of an op, or of the family of ops that it heads."""
    found = {backend.name: backend for backend in backends}
    _TABLES[op] = found
    return found


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def reference(module: str) -> Backend:
    """The op in plain PyTorch: any device, any floating dtype."""
    return Backend("reference", module, lambda: None, lambda device, dtype: None)


def cpu(module: str, launcher: str) -> Backend:
    """C++ loops of the extension over tiles that a BLAS has filled; `launcher` is one that the op needs."""

    def declines(device: str, dtype: torch.dtype) -> str | None:
        if device != "cpu":
            return f"takes CPU tensors, got {device}"
        return None if dtype in (*FLOATS, torch.float64) else f"does not take {dtype}"

    return Backend("cpu", module, lambda: _extension.unavailable(launcher), declines)


def _no_gpu(instead: str) -> Refusal | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU", instead
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU's compute capability is below 8.0", "use a GPU of compute capability 8.0 or newer"
    return None


def cuda(module: str, launcher: str) -> Backend:
    """CUDA C++ kernels of the extension on NVIDIA GPUs of compute capability 8.0 and newer; `launcher` is one of them."""

    def declines(device: str, dtype: torch.dtype) -> str | None:
        if device != "cuda":
            return f"takes CUDA tensors, got {device}"
        return None if dtype in FLOATS else f"does not take {dtype}"

    return Backend(
        "cuda",
        module,
        lambda: _extension.unavailable(launcher) or _no_gpu("use a machine with one"),
        declines,
    )


def triton(module: str) -> Backend:
    """Triton kernels on NVIDIA GPUs of compute capability 8.0 and newer."""

    def unavailable() -> Refusal | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed", "pip install 'triton>=3.6'"
        if interpreting():
            return None
        return _no_gpu("set TRITON_INTERPRET=1 to run the kernels, slowly, on CPU tensors")

    def declines(device: str, dtype: torch.dtype) -> str | None:
        if device != "cuda" and not (device == "cpu" and interpreting()):
            return f"takes CUDA tensors, got {device} (TRITON_INTERPRET=1 runs it on CPU tensors)"
        return None if dtype in FLOATS else f"does not take {dtype}"

    return Backend("triton", module, unavailable, declines)


def _refusal(backend: Backend, device: str, dtype: torch.dtype) -> str | None:
    declined = backend.declines(device, dtype)
    if declined is not None:
        return declined
    missing = backend.unavailable()
    return None if missing is None else f"{missing[0]} ({missing[1]})"


def _select(op: str, requested: str, table: str, device: str, dtype: torch.dtype) -> str:
    # Only strings and a dtype: torch.compile evaluates this call while it traces.
    backends = _TABLES[table]
    source = "backend"
    if requested == "auto":
        requested, source = os.environ.get("JRL_BACKEND", "auto") or "auto", "JRL_BACKEND"
    if requested != "auto":
        if requested not in backends:
            raise ValueError(f"{op}: {source} must be 'auto' or one of {sorted(backends)}, got {requested!r}")
        why = _refusal(backends[requested], device, dtype)
        if why is not None:
            raise NotImplementedError(f"{op}: {source} {requested!r} {why}")
        return requested
    # On a GPU the reference is never a silent substitute for a kernel: it would cost the memory the op exists to save.
    order = ("cuda", "triton") if device == "cuda" else ("cpu", "reference")
    refusals = []
    for name in order:
        if name in backends:
            why = _refusal(backends[name], device, dtype)
            if why is None:
                return name
            refusals.append(f"{name}: {why}")
    if device == "cuda":
        refusals.append("reference: never chosen for a CUDA tensor; ask for it with backend='reference'")
    raise NotImplementedError(
        f"{op}: no backend for a {dtype} tensor on {device}.\n  " + "\n  ".join(refusals)
    )


# What torch.compiler.assume_constant_result does, without importing the compiler (seconds) to do it.
_select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select(op: str, requested: str, table: str, tensor: torch.Tensor) -> str:
    """Name of the backend of `table` that will run `op` on `tensor`.

    `requested` is "auto" or a name; "auto" reads the environment variable JRL_BACKEND at each call (a compiled graph keeps
    what it read when it was traced).

    Raises:
        ValueError: the name is not one of the op's backends.
        NotImplementedError: the backend named, or with "auto" every backend, cannot serve; each says why.
    """
    return _select(op, requested, table, tensor.device.type, tensor.dtype)
