"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; biases, gains of norms and temperatures (fewer than two axes) do not.

    Args:
        parameters: those to optimise; frozen ones are left out.
        weight_decay: of the matrices.

    Raises:
        ValueError: nothing is left to optimise.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("parameters: none requires a gradient, so there is nothing to optimise")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def warmup_cosine(
    warmup_steps: int, total_steps: int, final_factor: float, start_factor: float = 0.0
) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear warm-up, then half a cosine down to `final_factor`.

    Args:
        warmup_steps: steps until the factor is 1; step 0 is already 1 / warmup_steps of the way from `start_factor`.
        total_steps: steps of the whole run; the factor stays at `final_factor` after them.
        final_factor: in [0, 1].
        start_factor: in [0, 1], where the warm-up begins.

    Raises:
        ValueError: `warmup_steps` is negative or not below `total_steps`, or a factor is outside [0, 1].
    """
    if warmup_steps < 0 or (warmup_steps and warmup_steps >= total_steps):
        raise ValueError(
            f"warmup_steps: expected fewer than the {total_steps} steps of the run, got {warmup_steps}"
        )
    for name, value in (("final_factor", final_factor), ("start_factor", start_factor)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a value in [0, 1], got {value}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return start_factor + (1 - start_factor) * (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
