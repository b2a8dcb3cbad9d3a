"""The implementations of word_context: the formula, and PyTorch's fused attention, which needs no kernel of ours."""

from __future__ import annotations

import torch

from ... import _dispatch


def _attention(device: str) -> _dispatch.Backend:
    def unavailable() -> _dispatch.Refusal | None:
        if device == "cuda" and not torch.cuda.is_available():
            return "PyTorch sees no CUDA GPU", "use a machine with one"
        return None

    def declines(found: str, dtype: torch.dtype) -> str | None:
        if found != device:
            return f"takes {device.upper()} tensors, got {found}"
        return None if dtype in (*_dispatch.FLOATS, torch.float64) else f"does not take {dtype}"

    return _dispatch.Backend(device, f"{__package__}.attention", unavailable, declines)


BACKENDS = _dispatch.table(
    "word_context",
    _dispatch.reference(f"{__package__}.reference"),
    _attention("cpu"),
    _attention("cuda"),
)
