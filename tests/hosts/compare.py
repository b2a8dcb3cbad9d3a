"""A loss of ours against a host's: values and gradients, a short training, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import extra_memory

Loss = Callable[..., Tensor]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


def values(loss: Loss, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The loss and its gradients; a graph that reaches a tensor in no way has zeros there."""
    given = leaves(tensors)
    found = loss(*given)
    wanted = [t for t in given if t.requires_grad]
    gradients = torch.autograd.grad(found, wanted, allow_unused=True)
    return [
        found.detach(),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, wanted, strict=True)),
    ]


def same(ours: Loss, theirs: Loss, tensors: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    """Loss and gradients agree to `tolerance` of the largest number of each."""
    for place, (found, truth) in enumerate(zip(values(ours, tensors), values(theirs, tensors), strict=True)):
        assert found.shape == truth.shape
        limit = tolerance * max(float(truth.abs().max()), 1e-3)
        error = float((found.double() - truth.double()).abs().max())
        assert error <= limit, (
            f"{'loss' if place == 0 else f'gradient {place}'}: {error:.3g} over {limit:.3g}"
        )


def train(
    model: nn.Module, step: Callable[[nn.Module, int], Tensor], steps: int = 4
) -> tuple[list[float], Any]:
    """Losses of `steps` steps of SGD from a copy of the model, and the weights after them."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for number in range(steps):
        torch.manual_seed(number)
        optimizer.zero_grad()
        loss = step(model, number)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def same_training(ours: tuple[list[float], Any], theirs: tuple[list[float], Any], tolerance: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert len(set(theirs[0])) == len(theirs[0]), "the host's loss does not move"
    for name, truth in theirs[1].items():
        assert torch.allclose(ours[1][name], truth, rtol=tolerance, atol=tolerance), name


def memory(loss: Loss, *tensors: Tensor) -> int:
    """Bytes that a forward and backward need at their peak beyond what is held."""
    given = leaves(tensors)

    def step() -> None:
        loss(*given).backward()
        for tensor in given:
            tensor.grad = None

    found = extra_memory(step, "cpu")
    if found is None:
        pytest.skip("the memory of a process is read from /proc, which this system lacks")
    return found
