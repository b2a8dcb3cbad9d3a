from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jrl_kernels import sigmoid_contrastive
from jrl_kernels.ops.info_nce.cases import POSITIVES, SHAPES, Shape, make_inputs
from tests.ops.conformance import (
    BACKENDS,
    FUSED,
    FUSED_DTYPES,
    assert_close_to_truth,
    cast,
    det,
    value_and_gradients,
)


def inputs(shape: Shape, bias: float = -3.0, **options: Any) -> dict[str, Any]:
    arguments = make_inputs(shape, **options)
    scale = arguments["scale"]
    return {**arguments, "bias": torch.full_like(scale, bias).requires_grad_()}


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_formula(backend: str, device: str) -> None:
    """Written out once more, pair by pair, as the paper's equation has it."""
    x, y = (F.normalize(det(4, 6, a=a), dim=1).float().to(device) for a in (0.37, 0.53))
    total = 0.0
    for i, j in itertools.product(range(4), range(4)):
        z = 1 if i == j else -1
        total += math.log1p(math.exp(-z * (7.0 * float(x[i] @ y[j]) - 2.0)))
    loss = sigmoid_contrastive(x, y, scale=7.0, bias=-2.0, backend=backend)
    assert float(loss) == pytest.approx(total / 4, rel=2e-6)


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("positives", POSITIVES)
def test_against_float64(backend: str, device: str, dtype: torch.dtype, positives: str) -> None:
    for shape, bias in itertools.product((*SHAPES.values(), Shape(1040, 1100, 12)), (-10.0, 4.0)):
        arguments = inputs(shape, bias, dtype=dtype, device=device, positives=positives)
        fused = value_and_gradients(partial(sigmoid_contrastive, backend=backend), arguments)
        plain = value_and_gradients(partial(sigmoid_contrastive, backend="reference"), arguments)
        truth = value_and_gradients(
            partial(sigmoid_contrastive, backend="reference"), cast(arguments, torch.float64)
        )
        assert_close_to_truth(fused, plain, truth, dtype)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_small_probabilities_keep_their_digits(backend: str, device: str) -> None:
    """At bias -20 every term is about 2e-9, which 1 + exp(s) in float32 would round away."""
    x, y = torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device)
    absent = (
        torch.zeros(3, dtype=torch.int64, device=device),
        torch.ones(3, dtype=torch.int64, device=device),
    )
    loss = sigmoid_contrastive(x, y, scale=1.0, bias=-20.0, positives=absent, backend=backend)
    assert float(loss) == pytest.approx(3 * math.log1p(math.exp(-20)), rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("positives", POSITIVES)
def test_gradcheck(backend: str, positives: str) -> None:
    arguments = inputs(Shape(5, 7, 3), dtype=torch.float64, positives=positives, scale=3.0)
    names = ("x", "y", "scale", "bias")

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return sigmoid_contrastive(**{**arguments, **dict(zip(names, values, strict=True))}, backend=backend)

    assert torch.autograd.gradcheck(loss, tuple(arguments[name] for name in names))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_each_gradient_alone(backend: str, device: str) -> None:
    arguments = inputs(SHAPES["ragged"], device=device)
    everything = value_and_gradients(partial(sigmoid_contrastive, backend=backend), arguments)
    for name in ("x", "y", "scale", "bias"):
        alone = {
            k: v.detach() if isinstance(v, torch.Tensor) and v.requires_grad and k != name else v
            for k, v in arguments.items()
        }
        found = value_and_gradients(partial(sigmoid_contrastive, backend=backend), alone)
        torch.testing.assert_close(found[f"d {name}"], everything[f"d {name}"], rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_edges(backend: str, device: str) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    empty = torch.randn(0, 4, device=device)
    assert float(sigmoid_contrastive(x, empty, scale=1.0, bias=0.0, positives=(
        torch.arange(3, device=device), torch.arange(0, device=device)), backend=backend)) == 0  # fmt: skip
    assert float(sigmoid_contrastive(empty, empty, scale=1.0, bias=0.0, backend=backend)) == 0
    bad = x.detach().clone()
    bad[1, 2] = math.nan
    bad.requires_grad_()
    loss = sigmoid_contrastive(bad, x, scale=1.0, bias=0.0, backend=backend)
    loss.backward()
    assert loss.isnan() and bad.grad is not None and bad.grad[1].isnan().all() and x.grad.isnan().all()
