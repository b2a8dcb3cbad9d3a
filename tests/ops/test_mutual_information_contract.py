"""What mutual_information owes besides its values: registration, compilation, autocast, determinism, refusals, messages."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import info_nce, mutual_information
from jrl_kernels.ops.mutual_information.cases import SHAPES, Shape, bytes_moved, flops, make_inputs
from tests.ops.conformance import BACKENDS, FUSED, value_and_gradients

VARIANTS: list[dict[str, Any]] = [
    {"bound": "nce"},
    {"bound": "nce", "direction": "y_to_x", "own_logit": -10.0},
    {"bound": "nce", "direction": "both"},
    {"bound": "jsd"},
    {"bound": "dv"},
]


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_opcheck(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of schema, fake tensors, autograd registration and AOT dispatch, on the calls the op makes."""
    calls: list[tuple[Any, ...]] = []
    real = torch.ops.jrl.mutual_information_forward

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(torch.ops.jrl, "mutual_information_forward", record)
    for i, options in enumerate(VARIANTS):
        arguments = make_inputs(SHAPES["local"], device=device, masks=i % 2 == 0) | options
        mutual_information(**arguments, backend=backend)
    monkeypatch.undo()
    assert len(calls) == len(VARIANTS)
    for call in calls:
        torch.library.opcheck(real.default, call)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiles_whole(backend: str, device: str) -> None:
    torch._dynamo.reset()
    for i, options in enumerate(VARIANTS):
        arguments = make_inputs(SHAPES["local"], device=device, masks=i % 2 == 1)
        call = partial(mutual_information, **options, backend=backend)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
        eager, graph = value_and_gradients(call, arguments), value_and_gradients(compiled, arguments)
        torch.testing.assert_close(graph, eager)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """A captured step replays on new numbers: nothing in it reads the GPU's memory on the host."""
    for options in VARIANTS:
        arguments = make_inputs(Shape(32, 16, 9, 64), dtype=torch.bfloat16, device="cuda", masks=True)
        arguments |= options
        leaves = [arguments[k] for k in ("x", "y", "scale")]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.autograd.grad(mutual_information(**arguments), leaves)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = mutual_information(**arguments)
            gradients = torch.autograd.grad(value, leaves)
        with torch.no_grad():
            arguments["x"].copy_(arguments["x"].flip(0))
        graph.replay()
        expected = mutual_information(**arguments)
        torch.testing.assert_close(value, expected)
        for got, want in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_more_scores_than_32_bits_count() -> None:
    """66,000 x 66,000 scores exceed 2^31 and 2^32; with one location an image the bound is log N less InfoNCE's loss."""
    x = torch.randn(66_000, 32, device="cuda", dtype=torch.bfloat16)
    loss = info_nce(x, x, scale=0.3, direction="x_to_y", backend="triton")
    found = mutual_information(x, x, scale=0.3, backend="triton")
    torch.testing.assert_close(found, math.log(66_000) - loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_same_bits_twice(backend: str, device: str) -> None:
    for options in VARIANTS:
        arguments = make_inputs(Shape(40, 31, 29, 9), device=device, masks=True) | options
        first, second = (
            value_and_gradients(partial(mutual_information, backend=backend), arguments) for _ in range(2)
        )
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_fused_backward_has_no_derivative(backend: str, device: str) -> None:
    for options in VARIANTS:
        arguments = make_inputs(SHAPES["local"], device=device) | options
        (gradient,) = torch.autograd.grad(
            mutual_information(**arguments, backend=backend), arguments["x"], create_graph=True
        )
        with pytest.raises(NotImplementedError, match="mutual_information.*backend='reference'"):
            gradient.square().sum().backward()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestAutocast:
    def test_operands_are_cast_as_for_a_product(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["local"], device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = mutual_information(**arguments, backend=backend)
        rounded = {k: v.bfloat16() if k in ("x", "y") else v for k, v in arguments.items()}
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, mutual_information(**rounded, backend=backend), rtol=1e-6, atol=0)

    def test_dtypes_meet(self, backend: str, device: str) -> None:
        x, y = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device, dtype=torch.bfloat16)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert mutual_information(x, y, backend=backend).isfinite()


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_gradients_have_their_inputs_dtype(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["local"], dtype=torch.bfloat16, device=device)
    found = value_and_gradients(partial(mutual_information, backend=backend), arguments)
    assert found["output 0"].dtype == found["d scale"].dtype == torch.float32
    assert found["d x"].dtype == found["d y"].dtype == torch.bfloat16


def test_costs() -> None:
    shape = Shape(2, 3, 5, 7)
    assert flops(shape, backward=False) == 2 * (2 * 3) * (2 * 5) * 7
    assert flops(shape, backward=True) == 4 * flops(shape, backward=False)
    assert bytes_moved(shape, torch.bfloat16, backward=True) == 3 * 2 * (2 * 3 + 2 * 5) * 7


X = torch.randn(4, 3)
LOCAL = torch.randn(4, 2, 3)
MASK = torch.ones(4, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "x must be a tensor, got float 1.0"),
        ((X, None), {}, TypeError, "y must be a tensor, got NoneType None"),
        ((X.long(), X), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ((X[0], X), {}, ValueError, r"x must have shape \[N, D\], got \[3\]"),
        ((LOCAL[None], X), {}, ValueError, r"x must have shape \[N, L, D\], got \[1, 4, 2, 3\]"),
        ((X, X[:3]), {}, ValueError, r"y must have shape \[N, D\] with N = 4, D = 3, got \[3, 3\]"),
        ((X, LOCAL[..., :2]), {}, ValueError, r"y must have shape \[N, M, D\] with .*got \[4, 2, 2\]"),
        ((X, X.double()), {}, TypeError, "y must be torch.float32 like x, got torch.float64"),
        ((X, X.to("meta")), {}, ValueError, "y must be on cpu like x, got meta"),
        ((X, X), {"bound": "mine"}, ValueError, r"bound must be one of \['nce', 'jsd', 'dv'\], got 'mine'"),
        ((X, X), {"direction": "up"}, ValueError, "direction must be one of .*got 'up'"),
        ((X, X), {"scale": "1"}, TypeError, "scale must be a number or a 0-d tensor, got str '1'"),
        ((X, X), {"scale": X}, ValueError, r"scale must be a 0-d tensor or a number, got shape \[4, 3\]"),
        ((X, X), {"own_logit": "no"}, TypeError, "own_logit must be a number, got str 'no'"),
        ((X, X), {"own_logit": float("inf")}, ValueError, "own_logit must be finite, got inf"),
        ((X, X), {"own_logit": -10.0, "bound": "dv"}, ValueError, "own_logit must be None with bound='dv'"),
        (
            (X[:1], X[:1]),
            {"bound": "jsd"},
            ValueError,
            r"bound='jsd' contrasts images: x must hold at least 2",
        ),
        ((X[:0], X[:0]), {"bound": "dv"}, ValueError, r"bound='dv' contrasts images.*got \[0, 3\]"),
        (
            (X, LOCAL),
            {"x_mask": MASK},
            ValueError,
            r"x_mask needs local features x \[N, L, D\], got x \[4, 3\]",
        ),
        ((X, LOCAL), {"y_mask": MASK.int()}, TypeError, "y_mask must be boolean"),
        (
            (X, LOCAL),
            {"y_mask": MASK[:, :1]},
            ValueError,
            r"y_mask must have shape \[N, M\] with .*got \[4, 1\]",
        ),
        ((X, LOCAL), {"y_mask": MASK.to("meta")}, ValueError, "y_mask must be on cpu like y, got meta"),
        ((X, X), {"backend": "cudnn"}, ValueError, "backend must be 'auto' or one of .*got 'cudnn'"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^mutual_information: .*{message}"):
        mutual_information(*arguments, **options)
