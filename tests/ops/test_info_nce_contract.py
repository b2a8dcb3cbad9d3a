"""What every op owes besides its values: registration, compilation, autocast, determinism, refusals and their messages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import info_nce, info_nce_from_scores, sigmoid_contrastive
from jrl_kernels.ops.info_nce.cases import POSITIVES, SHAPES, Shape, make_inputs
from tests.ops.conformance import BACKENDS, FUSED, value_and_gradients

SPARSE_IS_NEW = "ignore:Sparse CSR tensor support:UserWarning"


def sigmoid_inputs(device: str, positives: str = "diagonal") -> dict[str, Any]:
    arguments = make_inputs(SHAPES["ragged"], device=device, positives=positives)
    return {**arguments, "bias": torch.tensor(-3.0, device=device, requires_grad=True)}


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("positives", ["diagonal", "index", "ids"])
def test_opcheck(backend: str, device: str, positives: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of schema, fake tensors, autograd registration and AOT dispatch, on the calls the ops make."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for name in ("info_nce_forward", "sigmoid_contrastive_forward"):
        real = getattr(torch.ops.jrl, name)

        def record(*arguments: Any, real: Any = real) -> Any:
            calls.append((real.default, arguments))
            return real(*arguments)

        monkeypatch.setattr(torch.ops.jrl, name, record)
    arguments = make_inputs(SHAPES["tiny"], device=device, positives=positives, negatives=4, exclude=True)
    info_nce(**arguments, return_stats=True, backend=backend)
    info_nce(**arguments, direction="y_to_x", multi_positive="sum", backend=backend)
    info_nce_from_scores(
        torch.randn(5, 6, device=device, requires_grad=True), direction="x_to_y", backend=backend
    )
    sigmoid_contrastive(**sigmoid_inputs(device, positives), backend=backend)
    monkeypatch.undo()
    assert len(calls) == 4
    for op, inputs in calls:
        torch.library.opcheck(op, inputs)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("op", [info_nce, sigmoid_contrastive])
def test_compiles_whole(backend: str, device: str, op: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    for positives in ("diagonal", "index", "ids"):
        arguments = sigmoid_inputs(device, positives)
        if op is info_nce:
            arguments["negatives"] = torch.randn(5, arguments["x"].shape[1], device=device)
        call = partial(op, normalize=True, backend=backend)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
        eager, graph = value_and_gradients(call, arguments), value_and_gradients(compiled, arguments)
        torch.testing.assert_close(graph, eager)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiles_with_statistics_and_scores(backend: str, device: str) -> None:
    torch._dynamo.reset()

    def step(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss, stats = info_nce(x, y, scale=5.0, return_stats=True, backend=backend)
        return (
            loss + info_nce_from_scores(x @ y.T, backend=backend),
            stats.accuracy_x_to_y,
            stats.bound_y_to_x,
        )

    x, y = torch.randn(6, 4, device=device), torch.randn(6, 4, device=device)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x, y), step(x, y))


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """A captured step replays on new numbers: nothing in it reads the GPU's memory on the host."""
    arguments = make_inputs(Shape(512, 512, 64), dtype=torch.bfloat16, device="cuda", negatives=64)
    leaves = [arguments[k] for k in ("x", "y", "scale")]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(info_nce(**arguments), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = info_nce(**arguments)
        gradients = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        arguments["x"].copy_(arguments["x"].flip(0))
    graph.replay()
    expected = info_nce(**arguments)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_more_logits_than_32_bits_count() -> None:
    """66,000 x 66,000 logits exceed 2^31 and 2^32; the last row's loss is that of its own small problem."""
    x = torch.randn(66_000, 32, device="cuda", dtype=torch.bfloat16)
    losses, _ = info_nce(x, x, scale=0.3, reduction="none", backend="triton")
    last = info_nce(
        x[-5:], x, scale=0.3, positives=torch.arange(65_995, 66_000, device="cuda"), direction="x_to_y",
        reduction="none", backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(losses[-5:], last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_same_bits_twice(backend: str, device: str) -> None:
    for positives in POSITIVES:
        arguments = make_inputs(Shape(1100, 1030, 33), device=device, positives=positives, exclude=True)
        first, second = (value_and_gradients(partial(info_nce, backend=backend), arguments) for _ in range(2))
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=0)


class TestSecondDerivative:
    @pytest.mark.parametrize(("backend", "device"), FUSED)
    @pytest.mark.parametrize("op", [info_nce, sigmoid_contrastive])
    def test_fused_backward_refuses(self, backend: str, device: str, op: Callable[..., Any]) -> None:
        arguments = sigmoid_inputs(device)
        (gradient,) = torch.autograd.grad(op(**arguments, backend=backend), arguments["x"], create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{op.__name__}.*backend='reference'"):
            gradient.square().sum().backward()

    def test_reference_has_one(self) -> None:
        x, y = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradgradcheck(
            lambda x, y: info_nce(x, y, scale=2.0, backend="reference"), (x, y)
        )
        assert torch.autograd.gradgradcheck(
            lambda x, y: sigmoid_contrastive(x, y, scale=2.0, bias=-1.0, backend="reference"), (x, y)
        )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestAutocast:
    def test_operands_are_cast_and_logits_are_not(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device, negatives=5, positives="index", scale=100.0)
        half = {k: v.detach().bfloat16() if k in ("x", "y", "negatives") else v for k, v in arguments.items()}
        expected = info_nce(**half, backend=backend)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = info_nce(**arguments, backend=backend)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        found.backward()
        assert arguments["x"].grad.dtype == torch.float32 and arguments["scale"].grad.dtype == torch.float32

    def test_mixed_dtypes_meet_under_autocast(self, backend: str, device: str) -> None:
        x, y = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device, dtype=torch.bfloat16)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert info_nce(x, y, backend=backend).isfinite()


class TestDispatch:
    def test_auto_on_a_cpu_is_the_extension(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from jrl_kernels import _dispatch

        monkeypatch.delenv("JRL_BACKEND", raising=False)
        x = torch.randn(2, 2)
        assert _dispatch.select("info_nce", "auto", "info_nce", x) == "cpu"
        monkeypatch.setenv("JRL_BACKEND", "reference")
        assert _dispatch.select("info_nce", "auto", "info_nce", x) == "reference"
        assert _dispatch.select("info_nce", "cpu", "info_nce", x) == "cpu"

    def test_without_the_extension_auto_is_the_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from jrl_kernels import _dispatch, _extension

        monkeypatch.setattr(
            _extension, "unavailable", lambda launcher=None: ("it has not been built", "pip install .")
        )
        x = torch.randn(2, 2)
        assert _dispatch.select("info_nce", "auto", "info_nce", x) == "reference"
        with pytest.raises(
            NotImplementedError, match=r"backend 'cpu' it has not been built \(pip install \.\)"
        ):
            _dispatch.select("info_nce", "cpu", "info_nce", x)

    def test_a_gpu_tensor_never_falls_back_to_the_reference(self) -> None:
        from jrl_kernels import _dispatch

        with pytest.raises(NotImplementedError) as error:
            _dispatch._select("info_nce", "auto", "info_nce", "cuda", torch.float64)
        assert "triton: " in str(error.value) and "reference: never chosen" in str(error.value)

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*'cpu'.*got 'cudnn'"):
            info_nce(torch.randn(2, 2), torch.randn(2, 2), backend="cudnn")


X = torch.randn(4, 3)
LONG = torch.zeros(4, dtype=torch.int64)


@pytest.mark.filterwarnings(SPARSE_IS_NEW)
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "x must be a tensor, got float 1.0"),
        ((X.long(), X), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ((X[0], X), {}, ValueError, r"x must have shape \[rows, columns\], got \[3\]"),
        ((X, X[:, :2]), {}, ValueError, r"y must have shape \[rows, 3\], got \[4, 2\]"),
        ((X, X.double()), {}, TypeError, "y must be torch.float32 like x, got torch.float64"),
        ((X, X.to("meta")), {}, ValueError, "y must be on cpu like x, got meta"),
        ((X, X), {"negatives": X[:, :2]}, ValueError, r"negatives must have shape \[rows, 3\], got \[4, 2\]"),
        ((X, X), {"negatives": X.half()}, TypeError, "negatives must be torch.float32 like x"),
        ((X, X), {"scale": "10"}, TypeError, "scale must be a number or a 0-d tensor, got str '10'"),
        ((X, X), {"scale": X}, ValueError, r"scale must be a 0-d tensor or a number, got shape \[4, 3\]"),
        (
            (X, X),
            {"scale": LONG[0]},
            TypeError,
            "scale must be a floating 0-d tensor or a number, got torch.int64",
        ),
        ((X, X), {"bias": True}, TypeError, "bias must be a number or a 0-d tensor, got bool True"),
        (
            (X, X),
            {"direction": "up"},
            ValueError,
            r"direction must be one of \['both', 'x_to_y', 'y_to_x'\], got 'up'",
        ),
        ((X, X), {"multi_positive": "max"}, ValueError, "multi_positive must be one of"),
        ((X, X), {"reduction": "avg"}, ValueError, "reduction must be one of"),
        ((X, X), {"positives": "diagonal"}, TypeError, "positives must be None, an int64 index per row"),
        ((X, X), {"positives": LONG.int()}, TypeError, "positives must be int64, got torch.int32"),
        ((X, X), {"positives": LONG[:3]}, ValueError, r"positives must have shape \[4\], got \[3\]"),
        ((X, X), {"positives": LONG + 4}, ValueError, r"positives must hold row indices of y in \[0, 4\)"),
        ((X, X), {"positives": LONG - 1}, ValueError, r"positives must hold row indices of y in \[0, 4\)"),
        ((X, X), {"positives": (LONG,)}, ValueError, "positives as ids must be a pair"),
        (
            (X, X),
            {"positives": (LONG, LONG[:2])},
            ValueError,
            r"positives\[1\] must have shape \[4\], got \[2\]",
        ),
        ((X, X), {"positives": torch.eye(4) > 0}, ValueError, "dense matrix is not taken"),
        ((X, X), {"positives": torch.eye(4).to_sparse_csr()}, TypeError, "sparse matrix must be boolean"),
        ((X, X), {"positives": (torch.eye(4) > 0).to_sparse()}, TypeError, "must be CSR"),
        (
            (X, X[:2]),
            {"positives": (torch.eye(4) > 0).to_sparse_csr()},
            ValueError,
            r"shape \[4, 2\], got \[4, 4\]",
        ),
        (
            (X, X),
            {
                "positives": torch.sparse_csr_tensor(
                    [0, 2, 2, 2, 2], [1, 1], [True, True], (4, 4), check_invariants=False
                )
            },
            ValueError,
            "must increase strictly",
        ),
        (
            (X, X),
            {"positives": torch.sparse_csr_tensor([0, 1, 1, 1, 1], [1], [False], (4, 4))},
            ValueError,
            "got a stored False",
        ),
        ((X, X[:2]), {"exclude": LONG}, ValueError, "exclude as one tensor needs as many rows as columns"),
        (
            (X, X),
            {"exclude": (LONG, LONG, LONG)},
            ValueError,
            "exclude has ids for negatives, but negatives is None",
        ),
        ((X, X), {"exclude": 3}, TypeError, "exclude must be int64 ids or a pair"),
        ((X, X), {"exclude": (LONG, LONG.int())}, TypeError, r"exclude\[1\] must be int64, got torch.int32"),
        ((X, X), {"weights": LONG}, TypeError, "weights must be a floating tensor, got torch.int64"),
        ((X, X), {"weights": X[:, 0][:2]}, ValueError, r"weights must have shape \[4\], got \[2\]"),
        ((X, X), {"weights": (X[:, 0],)}, ValueError, r"weights must be \[M\] or a pair"),
        ((X, X), {"weights": X[:, 0], "positives": (LONG, LONG)}, ValueError, "must be a pair"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^info_nce: .*{message}"):
        info_nce(*arguments, **options)


def test_messages_of_the_others() -> None:
    with pytest.raises(TypeError, match=r"^sigmoid_contrastive: y must be torch.float32 like x"):
        sigmoid_contrastive(X, X.half(), scale=1.0, bias=0.0)
    with pytest.raises(ValueError, match=r"^sigmoid_contrastive: positives must hold row indices"):
        sigmoid_contrastive(X, X, scale=1.0, bias=0.0, positives=LONG + 9)
    with pytest.raises(ValueError, match=r"^info_nce_from_scores: scores must have shape"):
        info_nce_from_scores(X[0])
    with pytest.raises(ValueError, match=r"^info_nce_from_scores: exclude has ids for negatives"):
        info_nce_from_scores(X, exclude=(LONG, LONG[:3], LONG))
