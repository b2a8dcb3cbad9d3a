"""What late interaction owes besides its values: registration, compilation, autocast, determinism, refusals, messages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import max_sim, max_sim_varlen
from jrl_kernels.ops.max_sim.cases import SHAPES, Shape, make_inputs, pack
from tests.ops.conformance import BACKENDS, FUSED, value_and_gradients

DIRECTIONS = ("words", "regions", "both")


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opcheck(backend: str, device: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of schema, fake tensors, autograd registration and AOT dispatch, on the calls the ops make."""
    calls: list[tuple[Any, ...]] = []
    real = torch.ops.jrl.max_sim_forward

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(torch.ops.jrl, "max_sim_forward", record)
    arguments = make_inputs(SHAPES["tiny"], device=device, mask=True)
    max_sim(**arguments, direction=direction, mask_mode="zero", backend=backend)
    max_sim_varlen(**pack(arguments), direction=direction, reduce="mean", backend=backend)
    monkeypatch.undo()
    assert len(calls) == 2
    for inputs in calls:
        torch.library.opcheck(real.default, inputs)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiles_whole(backend: str, device: str) -> None:
    torch._dynamo.reset()
    how = "aot_eager" if device == "cpu" else "inductor"
    arguments = make_inputs(SHAPES["tiny"], device=device, mask=True)
    cases: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (partial(max_sim, direction="both", mask_mode="zero", backend=backend), arguments),
        (partial(max_sim_varlen, max_seqlen_words=6, direction="both", backend=backend), pack(arguments)),
    ]
    for call, inputs in cases:
        compiled = torch.compile(call, fullgraph=True, backend=how)
        eager, graph = value_and_gradients(call, inputs), value_and_gradients(compiled, inputs)
        torch.testing.assert_close(graph, eager)


def test_compiles_for_every_length() -> None:
    torch._dynamo.reset()
    backend = "cpu"
    compiled = torch.compile(
        partial(max_sim, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in (Shape(3, 4, 5, 6, 4), Shape(5, 2, 9, 7, 4)):
        arguments = make_inputs(shape)
        torch.testing.assert_close(compiled(**arguments), max_sim(**arguments, backend=backend))


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """A captured step replays on new numbers: nothing in it reads the GPU's memory on the host."""
    arguments = make_inputs(Shape(8, 9, 65, 40, 64), dtype=torch.bfloat16, device="cuda", mask=True)
    leaves = [arguments["regions"], arguments["words"]]
    upstream = torch.randn(8, 9, device="cuda")
    call = partial(max_sim, direction="both", reduce="mean")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(call(**arguments), leaves, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = call(**arguments)
        gradients = torch.autograd.grad(scores, leaves, upstream)
    with torch.no_grad():
        arguments["regions"].copy_(arguments["regions"].flip(1))
    graph.replay()
    expected = call(**arguments)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)
    for got, want in zip(gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.gpu
def test_more_choices_than_32_bits_count() -> None:
    """2^32 choices and more: the last image's scores and gradient are those of its own small problem."""
    regions = torch.randn(17_000, 2, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    words = torch.randn(17_000, 16, 16, device="cuda", dtype=torch.bfloat16)
    last = regions[-1:].detach().requires_grad_()
    scores = max_sim(regions, words, backend="triton")
    expected = max_sim(last, words, backend="triton")
    torch.testing.assert_close(scores[-1:], expected, rtol=1e-5, atol=1e-5)
    (whole,) = torch.autograd.grad(scores[-1].sum(), regions)
    (alone,) = torch.autograd.grad(expected.sum(), last)
    torch.testing.assert_close(whole[-1:], alone)
    assert not whole[:-1].any()


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_same_bits_twice(backend: str, device: str) -> None:
    for mask in (False, True):
        arguments = make_inputs(Shape(9, 11, 70, 33, 24), device=device, mask=mask)
        call = partial(max_sim, direction="both", backend=backend)
        first, second = (value_and_gradients(call, arguments) for _ in range(2))
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=0)


class TestSecondDerivative:
    @pytest.mark.parametrize(("backend", "device"), FUSED)
    def test_fused_backward_refuses(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device)
        scores = max_sim(**arguments, backend=backend)
        (gradient,) = torch.autograd.grad(scores.square().sum(), arguments["words"], create_graph=True)
        with pytest.raises(NotImplementedError, match="max_sim.*backend='reference'"):
            gradient.square().sum().backward()

    def test_reference_has_one(self) -> None:
        arguments = make_inputs(Shape(2, 3, 3, 4, 2), dtype=torch.float64, mask=True)
        inputs = arguments.pop("regions"), arguments.pop("words")
        call = partial(max_sim, **arguments, direction="both", backend="reference")
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestAutocast:
    def test_operands_are_cast_and_scores_are_not(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device)
        half = {name: value.detach().bfloat16() for name, value in arguments.items()}
        expected = max_sim(**half, backend=backend)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = max_sim(**arguments, backend=backend)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        found.sum().backward()
        assert arguments["regions"].grad.dtype == torch.float32

    def test_mixed_dtypes_meet_under_autocast(self, backend: str, device: str) -> None:
        regions, words = torch.randn(2, 4, 3, device=device), torch.randn(2, 4, 3, device=device).bfloat16()
        with torch.autocast(device, dtype=torch.bfloat16):
            assert max_sim(regions, words, backend=backend).isfinite().all()


def test_auto_on_a_cpu_is_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from jrl_kernels import _dispatch

    monkeypatch.delenv("JRL_BACKEND", raising=False)
    assert _dispatch.select("max_sim", "auto", "max_sim", torch.randn(2, 2)) == "cpu"


X = torch.randn(2, 4, 3)
ALL = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "regions must be a tensor, got float 1.0"),
        (
            (X.long(), X),
            {},
            TypeError,
            "regions must be float32, bfloat16, float16 or float64, got torch.int64",
        ),
        ((X[0], X), {}, ValueError, r"regions must have shape \[B, R, D\], got \[4, 3\]"),
        ((X, X[..., :2]), {}, ValueError, r"words must have shape \[C, T, D\] with D = 3, got \[2, 4, 2\]"),
        ((X, X.half()), {}, TypeError, "words must be torch.float32 like regions, got torch.float16"),
        ((X, X.to("meta")), {}, ValueError, "words must be on cpu like regions, got meta"),
        (
            (X, X),
            {"region_mask": ALL.long()},
            TypeError,
            "region_mask must be boolean, True for items that count",
        ),
        (
            (X, X),
            {"region_mask": ALL[:1]},
            ValueError,
            r"region_mask must have shape \[B, R\] with B = 2, R = 4",
        ),
        (
            (X, X[:, :3]),
            {"word_mask": ALL},
            ValueError,
            r"word_mask must have shape \[C, T\] with C = 2, T = 3",
        ),
        (
            (X, X),
            {"word_mask": ALL.to("meta")},
            ValueError,
            "word_mask must be on cpu like regions, got meta",
        ),
        ((X, X), {"reduce": "max"}, ValueError, r"reduce must be one of \['sum', 'mean'\], got 'max'"),
        (
            (X, X),
            {"direction": "up"},
            ValueError,
            r"direction must be one of \['words', 'regions', 'both'\], got 'up'",
        ),
        (
            (X, X),
            {"mask_mode": "min"},
            ValueError,
            r"mask_mode must be one of \['exclude', 'zero'\], got 'min'",
        ),
        ((X, X), {"backend": "cudnn"}, ValueError, r"backend must be 'auto' or one of .*, got 'cudnn'"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^max_sim: .*{message}"):
        max_sim(*arguments, **options)


ROWS = torch.randn(8, 3)
BOUNDS = torch.tensor([0, 3, 8])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, ROWS, BOUNDS, BOUNDS), {}, ValueError, r"regions must have shape \[N, D\], got \[2, 4, 3\]"),
        ((ROWS, ROWS[:, :2], BOUNDS, BOUNDS), {}, ValueError, r"words must have shape \[M, D\] with D = 3"),
        ((ROWS, ROWS, [0, 8], BOUNDS), {}, TypeError, "cu_seqlens_regions must be a tensor"),
        ((ROWS, ROWS, BOUNDS, BOUNDS.half()), {}, TypeError, "cu_seqlens_words must be int32 or int64, got torch.float16"),
        ((ROWS, ROWS, BOUNDS[:0], BOUNDS), {}, ValueError, r"cu_seqlens_regions must have shape \[sequences \+ 1\], got \[0\]"),
        ((ROWS, ROWS, BOUNDS, BOUNDS.to("meta")), {}, ValueError, "cu_seqlens_words must be on cpu like words, got meta"),
        ((ROWS, ROWS, BOUNDS[:2], BOUNDS), {}, ValueError, "cu_seqlens_regions must rise from 0 to 8, the number of rows"),
        ((ROWS, ROWS, BOUNDS, BOUNDS[1:]), {}, ValueError, "cu_seqlens_words must rise from 0 to 8"),
        ((ROWS, ROWS, BOUNDS[[0, 2, 1, 2]], BOUNDS), {}, ValueError, "cu_seqlens_regions must rise from 0 to 8"),
        ((ROWS, ROWS, BOUNDS, BOUNDS), {"max_seqlen_words": 4}, ValueError, "max_seqlen_words must be at least the longest"),
        ((ROWS, ROWS, BOUNDS, BOUNDS), {"max_seqlen_regions": 5.0}, TypeError, "max_seqlen_regions must be an int"),
        ((ROWS, ROWS, BOUNDS, BOUNDS), {"max_seqlen_regions": -1}, ValueError, "max_seqlen_regions must be at least 0"),
        ((ROWS, ROWS, BOUNDS, BOUNDS), {"direction": "up"}, ValueError, "direction must be one of"),
    ],
)  # fmt: skip
def test_messages_of_packed(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^max_sim_varlen: .*{message}"):
        max_sim_varlen(*arguments, **options)
