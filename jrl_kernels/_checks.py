"""Checks of a user's arguments, made once at the door of an op. None of them reads a GPU's memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: Any) -> str:
    """What came, in an error message: a tensor's dtype and shape, or another value's type and the start of its text."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + ' ...'}"


def tensor(op: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {describe(value)}")
    return value


def matrix(op: str, name: str, value: Any, columns: int | None = None) -> Tensor:
    """A floating tensor [rows, columns]."""
    tensor(op, name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.dim() != 2 or (columns is not None and value.shape[1] != columns):
        expected = f"[rows, {'columns' if columns is None else columns}]"
        raise ValueError(f"{op}: {name} must have shape {expected}, got {list(value.shape)}")
    return value


def shaped(op: str, name: str, value: Any, letters: str, sizes: dict[str, int]) -> Tensor:
    """A floating tensor whose axes `letters` names ("B R D"): a size known already must match, a new one is recorded."""
    tensor(op, name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return _axes(op, name, value, letters, sizes)


def _axes(op: str, name: str, value: Tensor, letters: str, sizes: dict[str, int]) -> Tensor:
    axes = letters.split()
    fits = value.dim() == len(axes) and all(
        sizes.get(axis, size) == size for axis, size in zip(axes, value.shape, strict=True)
    )
    if not fits:
        known = ", ".join(f"{axis} = {sizes[axis]}" for axis in axes if axis in sizes)
        expected = f"[{', '.join(axes)}]" + (f" with {known}" if known else "")
        raise ValueError(f"{op}: {name} must have shape {expected}, got {list(value.shape)}")
    sizes.update(zip(axes, value.shape, strict=True))
    return value


def mask(
    op: str, name: str, value: Any, letters: str, sizes: dict[str, int], like_name: str, like: Tensor
) -> Tensor:
    """A boolean tensor on the device of `like`, True where an item counts; axes as in `shaped`."""
    tensor(op, name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be boolean, True for items that count, got {value.dtype}")
    same_device(op, name, value, like_name, like)
    return _axes(op, name, value, letters, sizes)


def indices(
    op: str,
    name: str,
    value: Any,
    letters: str,
    sizes: dict[str, int],
    limit: int,
    like_name: str,
    like: Tensor,
) -> Tensor:
    """An int64 tensor of indices in [0, limit) on the device of `like`; axes as in `shaped`."""
    tensor(op, name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {value.dtype}")
    same_device(op, name, value, like_name, like)
    _axes(op, name, value, letters, sizes)
    condition(((value >= 0) & (value < limit)).all(), f"{op}: {name} must hold indices in [0, {limit})")
    return value


def number(op: str, name: str, value: Any, above: float | None = None, minimum: float | None = None) -> float:
    """A finite Python number, greater than `above` and at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {describe(value)}")
    if not math.isfinite(value) or (above is not None and value <= above):
        raise ValueError(f"{op}: {name} must be finite{_bound(' and greater than', above)}, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum:g}, got {value!r}")
    return float(value)


def _bound(words: str, value: float | None) -> str:
    return "" if value is None else f"{words} {value:g}"


def integer(op: str, name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """A Python int within bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {describe(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise ValueError(f"{op}: {name} must be at least {minimum}{upper}, got {value}")
    return value


def same_device(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like {like_name}, got {value.device}")


def same_dtype(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype} like {like_name}, got {value.dtype}")


def choice(op: str, name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {list(choices)}, got {value!r}")
    return str(value)


def vector(op: str, name: str, value: Any, length: int, like_name: str, like: Tensor) -> Tensor:
    """A floating tensor [length] on the device of `like`."""
    tensor(op, name, value)
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating tensor, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{op}: {name} must have shape [{length}], got {list(value.shape)}")
    same_device(op, name, value, like_name, like)
    return value


def ids(op: str, name: str, value: Any, length: int, like_name: str, like: Tensor) -> Tensor:
    """An int64 tensor [length] on the device of `like`."""
    tensor(op, name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{op}: {name} must have shape [{length}], got {list(value.shape)}")
    same_device(op, name, value, like_name, like)
    return value


def scalar(op: str, name: str, value: Any, like_name: str, like: Tensor) -> Tensor:
    """A number or 0-d tensor, as a 0-d tensor of the dtype that `like` is accumulated in, on its device."""
    dtype = accumulation(like.dtype)
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating 0-d tensor or a number, got {value.dtype}")
        if value.numel() != 1 or value.dim() > 1:
            raise ValueError(f"{op}: {name} must be a 0-d tensor or a number, got shape {list(value.shape)}")
        same_device(op, name, value, like_name, like)
        return value.reshape(()).to(dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number or a 0-d tensor, got {describe(value)}")
    return torch.full((), float(value), dtype=dtype, device=like.device)


def condition(holds: Tensor, message: str) -> None:
    """Raise ValueError where a CPU tensor is false; on a GPU fail asynchronously, since reading it would synchronise."""
    if holds.device.type == "cpu":
        if not torch.compiler.is_compiling() and not bool(holds):
            raise ValueError(message)
    else:
        torch._assert_async(holds, message)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` are accumulated in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's implementation, kept from having its float32 products cast by the caller's autocast."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        device = next(a for a in arguments if isinstance(a, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, the matrix operands in its dtype, as for torch.matmul; otherwise as they are."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
