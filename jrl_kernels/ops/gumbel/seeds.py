"""The seed of a call's noise, as a tensor that kernels load: a CUDA graph that is replayed draws anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks


def parse(op: str, noise: Any, seed: Any, like_name: str, like: Tensor) -> Tensor | None:
    """0-d int64 on the device of `like`; None without noise. seed None: drawn from PyTorch's generator there."""
    if not isinstance(noise, bool):
        raise TypeError(f"{op}: noise must be True or False, got {_checks.describe(noise)}")
    if seed is None:
        return torch.randint(2**63 - 1, (), device=like.device) if noise else None
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be an int or an int64 tensor, got {seed.dtype}")
        if seed.numel() != 1 or seed.dim() > 1:
            raise ValueError(f"{op}: seed must be 0-d or have one element, got shape {list(seed.shape)}")
        _checks.same_device(op, "seed", seed, like_name, like)
        # A copy: the backward draws the noise again, and the caller may advance the seed in place before it.
        return seed.detach().reshape(()).clone() if noise else None
    number = _checks.integer(op, "seed", seed, 0, 2**63 - 1)
    return torch.full((), number, dtype=torch.int64, device=like.device) if noise else None
