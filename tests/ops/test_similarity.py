"""similarity_matrix against its equations in float64: values, every gradient, edges, registration, refusals."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import _order, similarity_matrix
from jrl_kernels.ops.similarity.cases import SHAPES, make_inputs
from tests.ops.conformance import (
    BACKENDS,
    FUSED,
    FUSED_DTYPES,
    assert_close_to_truth,
    cast,
    det,
    value_and_gradients,
)

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")
METRICS = ("cosine", "dot", "order")


def direct(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """One pair at a time, as the equations are written."""
    rows = []
    for image in x:
        for sentence in y:
            if metric == "order":
                rows.append(-sum(max(0.0, float(s - i)) ** 2 for s, i in zip(sentence, image, strict=True)))
            else:
                norms = float(image.norm() * sentence.norm()) if metric == "cosine" else 1.0
                rows.append(float(image @ sentence) / norms)
    return torch.tensor(rows, dtype=torch.float64).reshape(len(x), len(y))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_equation(backend: str, device: str, metric: str) -> None:
    dtype = torch.float64 if device == "cpu" else torch.float32
    x, y = torch.randn(4, 7, dtype=dtype, device=device), torch.randn(5, 7, dtype=dtype, device=device)
    found = similarity_matrix(x, y, metric=metric, scale=2.5, backend=backend)
    torch.testing.assert_close(
        found.double().cpu(), 2.5 * direct(x.cpu(), y.cpu(), metric), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_golden_order(backend: str, device: str) -> None:
    image, text = (F.normalize(det(4, 6, a=a), dim=1).abs() for a in (0.37, 0.53))
    expected = torch.tensor([0.05675525, 0.37253678, 0.17036436, 0.01173237], dtype=torch.float64)
    for dtype, rtol in ((torch.float64, 5e-7), (torch.float32, 2e-5)):  # the table has eight decimals
        if device == "cuda" and dtype == torch.float64:
            continue
        inputs = image.to(device, dtype), text.to(device, dtype)
        found = -similarity_matrix(*inputs, metric="order", backend=backend)[:, 0]
        torch.testing.assert_close(found.double().cpu(), expected, rtol=rtol, atol=5e-9)


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_values_and_gradients(backend: str, device: str, dtype: torch.dtype, shape: str, metric: str) -> None:
    inputs = make_inputs(SHAPES[shape], dtype=dtype, device=device, metric=metric, requires_grad=True)
    inputs["scale"] = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    inputs = cast(inputs, dtype)
    found, plain, truth = (
        value_and_gradients(partial(similarity_matrix, backend=name), cast(inputs, precision))
        for name, precision in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    )
    assert_close_to_truth(found, plain, truth, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found["output 0"].dtype == (wide if metric == "order" else dtype)
    assert found["d x"].dtype == dtype


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("which", ["x", "y", "scale"])
def test_each_gradient_alone(backend: str, device: str, which: str) -> None:
    inputs = make_inputs(SHAPES["ragged"], device=device, metric="order")
    inputs["scale"] = torch.tensor(1.5, device=device)
    inputs[which].requires_grad_()
    found, truth = (
        value_and_gradients(partial(similarity_matrix, backend=name), cast(inputs, precision))
        for name, precision in ((backend, torch.float32), ("reference", torch.float64))
    )
    assert set(found) == {"output 0", f"d {which}"}
    assert_close_to_truth(found, found, truth, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(backend: str, metric: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 4, dtype=torch.float64, generator=generator).requires_grad_() for n in (3, 5))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return similarity_matrix(x, y, metric=metric, scale=scale, backend=backend)

    assert torch.autograd.gradcheck(function, (x, y, scale))
    if backend == "reference" or metric != "order":
        assert torch.autograd.gradgradcheck(function, (x, y, scale))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_second_derivative_is_refused(backend: str, device: str) -> None:
    x, y = (torch.randn(3, 4, device=device, requires_grad=True) for _ in range(2))
    (dx,) = torch.autograd.grad(
        similarity_matrix(x, y, metric="order", backend=backend).sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="order_similarity: its fused backward has no derivative"):
        dx.sum().backward()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_leading_axes_broadcast(backend: str, device: str, metric: str) -> None:
    x = torch.randn(2, 1, 4, 6, device=device, requires_grad=True)
    y = torch.randn(3, 5, 6, device=device, requires_grad=True)
    found = similarity_matrix(x, y, metric=metric, backend=backend)
    assert found.shape == (2, 3, 4, 5)
    apart = torch.stack(
        [torch.stack([similarity_matrix(a[0], b, metric=metric, backend=backend) for b in y]) for a in x]
    )
    torch.testing.assert_close(found, apart)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (x, y), upstream),
        torch.autograd.grad(apart, (x, y), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 2, 0), (0, 0, 4)])
def test_empty(backend: str, device: str, metric: str, sizes: tuple[int, int, int]) -> None:
    rows, columns, width = sizes
    x, y = (torch.randn(n, width, device=device, requires_grad=True) for n in (rows, columns))
    found = similarity_matrix(x, y, metric=metric, backend=backend)
    assert torch.equal(found, torch.zeros(rows, columns, device=device))
    for gradient, leaf in zip(torch.autograd.grad(found.sum(), (x, y)), (x, y), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_strides_do_not_matter(backend: str, device: str) -> None:
    x = torch.randn(19, 42, device=device).T[::2]
    y = torch.randn(1, 19, device=device).expand(30, 19)
    plain = similarity_matrix(x.contiguous(), y.contiguous(), metric="order", backend=backend)
    assert torch.equal(similarity_matrix(x, y, metric="order", backend=backend), plain)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_boundaries_of_the_hinge(backend: str, device: str) -> None:
    """x = y is the hinge's corner: its gradient there is 0; far apart coordinates square to 1e4 and more."""
    x = torch.full((3, 4), 2.0, device=device, requires_grad=True)
    found = similarity_matrix(x, x.detach(), metric="order", backend=backend)
    found.sum().backward()
    assert not found.any()
    assert x.grad is not None and not x.grad.any()
    far = similarity_matrix(-100 * torch.ones(1, 3), 100 * torch.ones(2, 3), metric="order", scale=100.0)
    assert far.tolist() == [[-12e6, -12e6]]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nan_and_infinity_reach_scores_and_gradients(backend: str, device: str) -> None:
    x, y = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    x[1, 2] = math.nan
    x.requires_grad_()
    y.requires_grad_()
    found = similarity_matrix(x, y, metric="order", backend=backend)
    assert found.isnan().all(1).tolist() == [False, True, False]
    assert found[[0, 2]].isfinite().all()
    dx, dy = torch.autograd.grad(found.sum(), (x, y))
    assert dx[1, 2].isnan() and dy[:, 2].isnan().all()
    assert dx[[0, 2]].isfinite().all() and dy[:, [0, 1, 3]].isfinite().all()
    far = similarity_matrix(
        torch.zeros_like(x), torch.full_like(y, math.inf), metric="order", backend=backend
    )
    assert far.eq(-math.inf).all()


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_same_bits_twice_and_wherever_a_pair_stands(backend: str, device: str) -> None:
    inputs = make_inputs(SHAPES["tall"], device=device, metric="order", requires_grad=True)
    first, second = (
        value_and_gradients(partial(similarity_matrix, backend=backend), inputs) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows, columns = torch.randperm(130, device=device), torch.randperm(67, device=device)[:33]
    moved = similarity_matrix(inputs["x"][rows], inputs["y"][columns], metric="order", backend=backend)
    assert torch.equal(moved, first["output 0"][rows][:, columns])


def test_tiles_that_lie_apart() -> None:
    """Rows of `out` and of `g` that lie apart; gradients are added to what is there, one side or both."""
    x, y = torch.randn(5, 7), torch.randn(18, 7)
    out = torch.zeros(5, 40)
    _order.scores(x, y, out[:, 3:21])
    v = (y - x[:, None]).clamp(min=0)
    torch.testing.assert_close(out[:, 3:21], -v.square().sum(-1))
    assert not out[:, :3].any() and not out[:, 21:].any()
    g = torch.randn(5, 40)[:, 3:21]
    g[2] = 0.0
    dx, dy = torch.ones(5, 7), torch.full((18, 7), 2.0)
    _order.accumulate_gradients(g, x, y, dx, None)
    _order.accumulate_gradients(g, x, y, None, dy)
    torch.testing.assert_close(dx, 1 + (2 * g[..., None] * v).sum(1))
    torch.testing.assert_close(dy, 2 - (2 * g[..., None] * v).sum(0))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_opcheck(backend: str, device: str) -> None:
    x, y = (torch.randn(2, n, 5, device=device, requires_grad=True) for n in (3, 4))
    torch.library.opcheck(torch.ops.jrl.order_similarity_forward.default, (x, y, backend))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_compiles_whole(backend: str, device: str, metric: str) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(SHAPES["tiny"], device=device, metric=metric, requires_grad=True)
    call = partial(similarity_matrix, scale=2.0, backend=backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, graph = value_and_gradients(call, inputs), value_and_gradients(compiled, inputs)
    for name, value in eager.items():
        torch.testing.assert_close(graph[name], value)


@pytest.mark.parametrize("metric", METRICS)
def test_autocast_casts_products_alone(metric: str) -> None:
    inputs = make_inputs(SHAPES["tiny"], metric=metric)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = similarity_matrix(**inputs)
    assert found.dtype == (torch.float32 if metric == "order" else torch.bfloat16)
    torch.testing.assert_close(found.float(), similarity_matrix(**inputs), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"similarity_matrix: x must be a tensor, got list \[1.0\]"),
        ({"y": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "y must be float32, .*, got torch.int64"),
        ({"x": torch.ones(3)}, ValueError, r"x must have shape \[..., rows, D\], got \[3\]"),
        ({"y": torch.ones(4, 2)}, ValueError, r"y must have shape \[..., N, 3\] like x, got \[4, 2\]"),
        ({"y": torch.ones(4, 3).double()}, TypeError, "y must be torch.float32 like x, got torch.float64"),
        (
            {"x": torch.ones(2, 5, 3), "y": torch.ones(3, 4, 3)},
            ValueError,
            "leading axes of x and y must broadcast",
        ),
        ({"metric": "angle"}, ValueError, r"metric must be one of \['cosine', 'dot', 'order'\], got 'angle'"),
        ({"scale": "1"}, TypeError, "scale must be a number or a 0-d tensor"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must be a 0-d tensor or a number, got shape \[2\]"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"metric": "order", "backend": "cuda"}, ValueError, "backend must be 'auto' or one of"),
        ({"metric": "order", "backend": "triton"}, NotImplementedError, "backend 'triton'"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(5, 3), "y": torch.ones(4, 3)} | change
    with pytest.raises(error, match=message):
        similarity_matrix(**arguments)
