"""Whether a judge shares weights with what it judges."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def shared_parameters(judged: nn.Module, judge: nn.Module) -> list[tuple[str, str]]:
    """Parameters of two modules that are the same numbers, whatever their dtype or device.

    Tensors of one value, such as biases and gains that never trained, say nothing and are left out.

    Args:
        judged: a system that generates, with the encoders it was trained with.
        judge: what is to score its pictures.

    Returns:
        Names in `judged` and in `judge`.
    """
    ours = _digests(judged)
    return [(ours[digest], name) for digest, name in _digests(judge).items() if digest in ours]


def check_independent(judged: nn.Module, judge: nn.Module, argument: str) -> None:
    """Refuse a judge with weights that the generator was trained with: it would be judged by what it was made to please.

    Args:
        judged: a system that generates.
        judge: of its pictures.
        argument: how the caller names the judge.

    Raises:
        ValueError: a parameter is the same in both.
    """
    shared = shared_parameters(judged, judge)
    if shared:
        theirs, its = shared[0]
        raise ValueError(
            f"{argument}: expected weights that no part of the generator was trained with, got {len(shared)} tensors "
            f"that are the same, such as {its!r}, which is the generating system's {theirs!r}"
        )


def _digests(module: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        if values.numel() < 2 or bool((values == values.flatten()[0]).all()):
            continue
        # the first name stays: the averaged generator may still equal the generator
        found.setdefault(
            f"{tuple(values.shape)} {hashlib.sha256(values.numpy().tobytes()).hexdigest()}", name
        )
    return found
