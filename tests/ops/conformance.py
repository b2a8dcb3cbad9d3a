"""How every op is judged: its error against float64 is at most twice that of plain PyTorch in the same dtype, plus a floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

# What rounding alone may do to a quantity of size one: a few units in the last place of the inputs' dtype.
FLOOR = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 3e-4}

BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]
"""(backend, device) of tests at any size; the interpreter has tests of its own at small ones."""

FUSED = BACKENDS[1:]

FUSED_DTYPES = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}".replace("torch.", ""), marks=case.marks)
    for case in FUSED
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if not (case.id == "triton" and dtype == torch.float64)
]
"""(backend, device, dtype): each backend at the dtypes it takes."""


def det(*shape: int, a: float) -> Tensor:
    """Inputs of the golden values: element i of the flattened tensor is sin(a (i + 1)), float64."""
    count = int(torch.tensor(shape).prod())
    return torch.sin(a * (torch.arange(count, dtype=torch.float64) + 1)).reshape(shape)


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers in another dtype: floating tensors are detached, converted and, where they were leaves, leaves again."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(convert(v) for v in value)
        if isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point():
            wanted = dtype if value.dim() else (torch.float64 if dtype == torch.float64 else torch.float32)
            return value.detach().to(wanted).requires_grad_(value.requires_grad)
        return value

    return {name: convert(value) for name, value in arguments.items()}


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: v for name, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}


def value_and_gradients(
    function: Callable[..., Any], arguments: dict[str, Any], upstream: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """The outputs, and the gradient of every leaf, of sum(output * upstream)."""
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        upstream = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).reshape(o.shape) for o in outputs]
    total = sum((o * u.to(o.dtype)).sum() for o, u in zip(outputs, upstream, strict=True))
    inputs = leaves(arguments)
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for name, leaf, gradient in zip(inputs, inputs.values(), gradients, strict=True):
        found[f"d {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def assert_close_to_truth(
    fused: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """`fused` and `plain` are in `dtype`, `truth` in float64. Norm and direction of each gradient are judged too."""
    assert fused.keys() == truth.keys()
    for name, exact in truth.items():
        exact = exact.double().cpu()
        got, usual = fused[name].double().cpu(), plain[name].double().cpu()
        assert got.shape == exact.shape, name
        if exact.numel() == 0:
            continue
        size = max(1.0, float(exact.abs().max()))
        error, allowed = (got - exact).abs().max(), 2 * (usual - exact).abs().max() + FLOOR[dtype] * size
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
        if name.startswith("d ") and exact.norm() > 1e-6:
            loose = 50 * FLOOR[dtype]
            assert abs(got.norm() / exact.norm() - 1) <= loose, (
                f"{name}: norm {got.norm():.6g}, truth {exact.norm():.6g}"
            )
            cosine = (got * exact).sum() / (got.norm() * exact.norm())
            assert cosine >= 1 - loose, f"{name}: cosine with the truth {cosine:.6g}"
