"""What the ranking loss owes besides its values: registration, compilation, autocast, determinism, memory, refusals."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import ranking_loss, ranking_loss_from_scores
from jrl_kernels.ops.ranking_loss.backends import BACKENDS as IMPLEMENTATIONS
from jrl_kernels.ops.ranking_loss.cases import SHAPES, Shape, bytes_moved, flops, make_inputs
from tests.ops.conformance import BACKENDS, FUSED, value_and_gradients

HARDEST = (False, True)


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("hardest", HARDEST)
def test_opcheck(backend: str, device: str, hardest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of schema, fake tensors, autograd registration and AOT dispatch, on the calls the op makes."""
    calls: list[tuple[Any, ...]] = []
    real = torch.ops.jrl.ranking_loss_forward

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(torch.ops.jrl, "ranking_loss_forward", record)
    for metric in ("cosine", "order"):
        arguments = make_inputs(SHAPES["wide"], device=device, metric=metric, exclude=True)
        ranking_loss(**arguments, hardest=hardest, backend=backend)
        ranking_loss(**arguments, hardest=hardest, direction="y_to_x", backend=backend)
    scores = torch.randn(5, 6, device=device, requires_grad=True)
    ranking_loss_from_scores(scores, hardest=hardest, direction="x_to_y", backend=backend)
    monkeypatch.undo()
    assert len(calls) == 5
    for inputs in calls:
        torch.library.opcheck(real.default, inputs)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("hardest", HARDEST)
def test_compiles_whole(backend: str, device: str, hardest: bool) -> None:
    torch._dynamo.reset()
    compiler = "aot_eager" if device == "cpu" else "inductor"
    for metric in ("cosine", "order"):
        arguments = make_inputs(SHAPES["wide"], device=device, metric=metric, exclude=True)
        call = partial(ranking_loss, hardest=hardest, backend=backend)
        compiled = torch.compile(call, fullgraph=True, backend=compiler)
        eager, graph = value_and_gradients(call, arguments), value_and_gradients(compiled, arguments)
        torch.testing.assert_close(graph, eager)
    given = {"scores": torch.randn(5, 6, device=device, requires_grad=True)}
    call = partial(ranking_loss_from_scores, hardest=hardest, reduction="mean", backend=backend)
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    torch.testing.assert_close(value_and_gradients(compiled, given), value_and_gradients(call, given))


@pytest.mark.gpu
@pytest.mark.parametrize("hardest", HARDEST)
def test_cuda_graph(hardest: bool) -> None:
    """A captured step replays on new numbers: nothing in it reads the GPU's memory on the host."""
    arguments = make_inputs(Shape(512, 512, 64, 100), dtype=torch.bfloat16, device="cuda")
    leaves = [arguments[k] for k in ("x", "y")]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(ranking_loss(**arguments, hardest=hardest), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ranking_loss(**arguments, hardest=hardest)
        gradients = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        arguments["x"].copy_(arguments["x"].flip(0))
    graph.replay()
    expected = ranking_loss(**arguments, hardest=hardest)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("hardest", HARDEST)
def test_more_scores_than_32_bits_count(hardest: bool) -> None:
    """66,000 x 66,000 scores exceed 2^31 and 2^32; the last rows' losses are those of dense scores."""
    x = torch.randn(66_000, 32, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(66_000, 32, device="cuda", dtype=torch.bfloat16)
    losses = ranking_loss(
        x, y, metric="dot", hardest=hardest, direction="x_to_y", reduction="none", backend="triton"
    )
    assert isinstance(losses, torch.Tensor)
    dense = x[-5:].double() @ y.double().T
    positive = dense[:, -5:].diagonal()
    violations = (0.2 - positive[:, None] + dense).clamp(min=0)
    violations[:, -5:].fill_diagonal_(0.0)
    expected = violations.amax(1) if hardest else violations.sum(1)
    torch.testing.assert_close(losses[-5:].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_same_bits_twice(backend: str, device: str) -> None:
    for hardest, metric in itertools.product(HARDEST, ("dot", "order")):
        shape = Shape(1100, 1030, 33, 50) if metric == "dot" else Shape(130, 70, 33, 50)
        arguments = make_inputs(shape, device=device, metric=metric, exclude=True)
        call = partial(ranking_loss, hardest=hardest, backend=backend)
        first, second = (value_and_gradients(call, arguments) for _ in range(2))
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=0)


def assert_counts_are_those_of_the_tiles(backend: str, arguments: dict[str, Any]) -> None:
    """The violations that the forward counted are those that the backward's tiles find."""
    from jrl_kernels._sweep import Source
    from jrl_kernels.ops.ranking_loss.sweep import Options

    implementation: Any = IMPLEMENTATIONS[backend].load()
    x, y = (implementation.prepare(arguments[name].detach()) for name in ("x", "y"))
    source = Source(x, y, None, torch.ones((), device=x.device))
    pairs = min(source.shape)
    x_ids, y_ids = arguments["exclude"]
    options = Options(arguments["metric"], False, x_ids, y_ids, True, True, pairs, 0)
    base = 0.05 - implementation.positive_scores(source, options)
    ones = torch.ones(pairs, device=x.device)
    rows, columns = implementation.statistics(source, options, base)
    for side, axis, grads in ((rows, 1, (ones, None)), (columns, 0, (None, ones))):
        tile, block = implementation.gradient(source, options, base, *grads)
        found = torch.zeros(source.shape[1 - axis], dtype=torch.int64, device=x.device)
        for r0 in range(0, source.shape[0], block[0]):
            for c0 in range(0, source.shape[1], block[1]):
                r1, c1 = min(r0 + block[0], source.shape[0]), min(c0 + block[1], source.shape[1])
                part = slice(r0, r1) if axis == 1 else slice(c0, c1)
                found[part] += (tile(r0, r1, c0, c1) != 0).sum(axis)
        assert side.number.any()
        assert torch.equal(side.number, found[:pairs])


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("metric", ["dot", "order"])
def test_forward_and_backward_see_the_same_violations(backend: str, device: str, metric: str) -> None:
    arguments = make_inputs(Shape(1100, 1030, 7), device=device, metric=metric, exclude=True)
    assert_counts_are_those_of_the_tiles(backend, arguments)


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("hardest", HARDEST)
def test_nothing_of_the_scores_size_is_saved(backend: str, device: str, hardest: bool) -> None:
    arguments = make_inputs(Shape(300, 400, 8, 200), device=device, metric="dot", exclude=True)
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ranking_loss(**arguments, hardest=hardest, backend=backend)
    assert saved and max(saved) <= 400 * 8


class TestSecondDerivative:
    @pytest.mark.parametrize(("backend", "device"), FUSED)
    @pytest.mark.parametrize("hardest", HARDEST)
    def test_fused_backward_refuses(self, backend: str, device: str, hardest: bool) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device)
        loss = ranking_loss(**arguments, hardest=hardest, backend=backend)
        (gradient,) = torch.autograd.grad(loss, arguments["x"], create_graph=True)
        with pytest.raises(NotImplementedError, match="ranking_loss.*backend='reference'"):
            gradient.square().sum().backward()

    @pytest.mark.parametrize("hardest", HARDEST)
    @pytest.mark.parametrize("metric", ["cosine", "dot", "order"])
    def test_reference_has_one(self, hardest: bool, metric: str) -> None:
        arguments = make_inputs(Shape(4, 5, 3, 2), dtype=torch.float64, metric=metric)

        def loss(x: torch.Tensor, y: torch.Tensor) -> Any:
            # The loss of dot products is piecewise bilinear: x alone would have no second derivative.
            given = {**arguments, "x": x, "y": y}
            return ranking_loss(**given, margin=0.3, hardest=hardest, backend="reference")

        assert torch.autograd.gradgradcheck(loss, (arguments["x"], arguments["y"]))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestAutocast:
    def test_operands_are_cast_and_scores_are_not(self, backend: str, device: str) -> None:
        for hardest, metric in itertools.product(HARDEST, ("dot", "order")):
            arguments = make_inputs(SHAPES["ragged"], device=device, metric=metric)
            half = {
                k: v.detach().bfloat16() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
            }
            expected = ranking_loss(**half, hardest=hardest, backend=backend)
            with torch.autocast(device, dtype=torch.bfloat16):
                found = ranking_loss(**arguments, hardest=hardest, backend=backend)
            assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            found.backward()
            assert arguments["x"].grad.dtype == torch.float32

    def test_mixed_dtypes_meet_under_autocast(self, backend: str, device: str) -> None:
        x, y = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device, dtype=torch.bfloat16)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert ranking_loss(x, y, backend=backend).isfinite()


def test_auto_on_a_cpu_is_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from jrl_kernels import _dispatch

    monkeypatch.delenv("JRL_BACKEND", raising=False)
    assert _dispatch.select("ranking_loss", "auto", "ranking_loss", torch.randn(2, 2)) == "cpu"
    with pytest.raises(NotImplementedError, match="reference: never chosen"):
        _dispatch._select("ranking_loss", "auto", "ranking_loss", "cuda", torch.float64)


def test_costs_count_every_product() -> None:
    shape = Shape(10, 20, 4, 5)
    assert flops(shape, backward=False) == 2 * 4 * (10 * 20 + 10 * 5)
    assert flops(shape, backward=True) == 2 * 4 * (4 * 10 * 20 + 3 * 10 * 5)
    assert bytes_moved(shape, torch.bfloat16, backward=False) == 2 * 4 * (10 + 20 + 5)
    assert bytes_moved(shape, torch.bfloat16, backward=True) == 2 * 4 * (3 * (10 + 20) + 2 * 5)


X = torch.randn(4, 3)
LONG = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "x must be a tensor, got float 1.0"),
        ((X.long(), X), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ((X[0], X), {}, ValueError, r"x must have shape \[rows, columns\], got \[3\]"),
        ((X, X[:, :2]), {}, ValueError, r"y must have shape \[rows, 3\], got \[4, 2\]"),
        ((X, X.double()), {}, TypeError, "y must be torch.float32 like x, got torch.float64"),
        ((X, X.to("meta")), {}, ValueError, "y must be on cpu like x, got meta"),
        ((X, X), {"negatives": [1.0]}, TypeError, r"negatives must be a tensor, got list"),
        ((X, X), {"negatives": X[:, :2]}, ValueError, r"negatives must have shape \[rows, 3\], got \[4, 2\]"),
        ((X, X), {"negatives": X.half()}, TypeError, "negatives must be torch.float32 like x"),
        ((X, X), {"negatives": X.to("meta")}, ValueError, "negatives must be on cpu like x, got meta"),
        ((X, X), {"margin": "1"}, TypeError, "margin must be a number, got str '1'"),
        ((X, X), {"margin": torch.tensor(0.2)}, TypeError, "margin must be a number, got torch.float32"),
        ((X, X), {"margin": -0.1}, ValueError, "margin must be at least 0, got -0.1"),
        ((X, X), {"margin": float("inf")}, ValueError, "margin must be finite, got inf"),
        ((X, X), {"hardest": 1}, TypeError, "hardest must be a bool, got int 1"),
        (
            (X, X),
            {"metric": "l2"},
            ValueError,
            r"metric must be one of \['cosine', 'dot', 'order'\], got 'l2'",
        ),
        ((X, X), {"direction": "up"}, ValueError, "direction must be one of"),
        ((X, X), {"reduction": "avg"}, ValueError, r"reduction must be one of \['sum', 'mean', 'none'\]"),
        ((X, X), {"backend": "cudnn"}, ValueError, r"backend must be 'auto' or one of .*got 'cudnn'"),
        ((X, X[:2]), {"exclude": LONG}, ValueError, "exclude as one tensor needs as many rows as columns"),
        ((X, X), {"exclude": (LONG, LONG, LONG)}, ValueError, "exclude has ids for negatives"),
        ((X, X), {"exclude": 3}, TypeError, "exclude must be int64 ids or a pair"),
        ((X, X), {"exclude": (LONG, LONG.int())}, TypeError, r"exclude\[1\] must be int64, got torch.int32"),
        ((X, X), {"exclude": (LONG, LONG[:2])}, ValueError, r"exclude\[1\] must have shape \[4\], got \[2\]"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^ranking_loss: .*{message}"):
        ranking_loss(*arguments, **options)


def test_messages_of_scores() -> None:
    with pytest.raises(ValueError, match=r"^ranking_loss_from_scores: scores must have shape"):
        ranking_loss_from_scores(X[0])
    with pytest.raises(TypeError, match=r"^ranking_loss_from_scores: scores must be float32"):
        ranking_loss_from_scores(X.long())
    with pytest.raises(ValueError, match=r"^ranking_loss_from_scores: exclude has ids for negatives"):
        ranking_loss_from_scores(X, exclude=(LONG, LONG[:3], LONG))
    with pytest.raises(ValueError, match=r"^ranking_loss_from_scores: margin must be at least 0"):
        ranking_loss_from_scores(X, margin=-1)
