"""word_context: golden values, float64 truth, every gradient, masks, contract and messages."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jrl_kernels import _dispatch, word_context
from jrl_kernels.ops.word_context.cases import SHAPES, Shape, make_inputs
from tests.ops.conformance import assert_close_to_truth, cast, det, value_and_gradients

BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
FUSED = BACKENDS[1:]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_golden(backend: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Numbers of XMC-GAN's attention_for_g."""
    mask = (torch.arange(6) < torch.tensor([6, 4, 2])[:, None]).to(device)
    regions, words = (t.to(device, dtype) for t in (det(3, 4, 5, a=0.37), det(3, 6, 5, a=0.53)))
    context = word_context(regions, words, word_mask=mask, backend=backend)
    assert float(context.double().sum()) == pytest.approx(2.1063609092, rel=tolerance)
    # Printed to 8 digits after the point.
    row = torch.tensor([-0.39952541, -0.49152331, -0.44865416, -0.28268066, -0.03914358], dtype=torch.float64)
    torch.testing.assert_close(context[1, 2].double().cpu(), row, rtol=tolerance, atol=5.1e-9)
    both, attention = word_context(regions, words, word_mask=mask, return_attention=True, backend=backend)
    torch.testing.assert_close(both, context, rtol=tolerance, atol=tolerance)
    golden = torch.tensor([0.842217350, 1.5728e-07, 7.11235894e-06, 0.157775380, 0, 0], dtype=torch.float64)
    found = attention[1, 2].double().cpu()
    torch.testing.assert_close(found[[0, 2, 3]], golden[[0, 2, 3]], rtol=max(tolerance, 1e-8), atol=0)
    torch.testing.assert_close(found[1], golden[1], rtol=1e-4, atol=0)
    assert not found[4:].any()


@pytest.mark.usefixtures("nan_filled_allocations")
@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(backend: str, device: str, dtype: torch.dtype, shape: str) -> None:
    for mask in (False, True):
        for scale in (15.0, 0.0, -3.0):
            arguments = make_inputs(SHAPES[shape], dtype=dtype, device=device, mask=mask, scale=scale)
            # Of one size and either sign, so that no dtype rounds it and the sums of the gradients do not cancel.
            upstream = [
                torch.randn(arguments["regions"].shape, generator=torch.Generator().manual_seed(1))
                .sign()
                .to(device)
            ]
            found, plain, truth = (
                value_and_gradients(
                    partial(word_context, backend=which), cast(arguments, precision), upstream
                )
                for which, precision in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
            )
            assert_close_to_truth(found, plain, truth, dtype)
            assert found["output 0"].dtype == dtype


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_extreme_scale(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["ragged"], device=device, scale=100.0)
    found = value_and_gradients(partial(word_context, backend=backend), arguments)
    truth = value_and_gradients(partial(word_context, backend="reference"), cast(arguments, torch.float64))
    for name, value in found.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: str) -> None:
    arguments = make_inputs(Shape(3, 4, 5, 3), dtype=torch.float64, scale=3.0)
    mask = arguments.pop("word_mask")

    def context(*values: torch.Tensor) -> torch.Tensor:
        regions, words, scale = values
        return word_context(regions, words, word_mask=mask, attention_scale=scale, backend=backend)

    assert torch.autograd.gradcheck(context, tuple(arguments.values()))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(context, tuple(arguments.values()))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_each_gradient_alone(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["ragged"], device=device)
    everything = value_and_gradients(partial(word_context, backend=backend), arguments)
    for name in ("regions", "words", "attention_scale"):
        alone = {k: v if k in (name, "word_mask") else v.detach() for k, v in arguments.items()}
        found = value_and_gradients(partial(word_context, backend=backend), alone)
        torch.testing.assert_close(found[f"d {name}"], everything[f"d {name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestEdges:
    def test_no_words(self, backend: str, device: str) -> None:
        """A caption without words, by its mask or by its length: context exactly 0, no gradient, and no NaN from padding."""
        arguments = make_inputs(SHAPES["tiny"], device=device)
        mask = arguments["word_mask"]
        with torch.no_grad():
            arguments["words"][~mask] = math.nan
        found = value_and_gradients(partial(word_context, backend=backend), arguments)
        assert not any(value.isnan().any() for value in found.values())
        assert not found["output 0"][-1].any() and not found["d regions"][-1].any()
        assert not found["d words"][~mask].any()
        assert found["d words"][mask].any()
        for shape in (Shape(2, 3, 0, 5), Shape(0, 3, 4, 5), Shape(2, 0, 4, 5)):
            for masked in (False, True):
                empty = make_inputs(shape, device=device, mask=masked)
                found = value_and_gradients(partial(word_context, backend=backend), empty)
                assert found["output 0"].shape == (shape.images, shape.regions, shape.width)
                assert not any(value.any() for value in found.values())

    def test_nan_reaches_the_output(self, backend: str, device: str) -> None:
        for name in ("regions", "words"):
            arguments = make_inputs(SHAPES["tiny"], device=device, mask=False)
            with torch.no_grad():
                arguments[name][1, 2, 0] = math.nan
            context = word_context(**arguments, backend=backend)
            assert (
                context[1, 2].isnan().all() and not context[0].isnan().any() and not context[2].isnan().any()
            )

    def test_zero_vectors(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device, mask=False)
        with torch.no_grad():
            arguments["regions"][0, 1] = 0
            arguments["words"][1, 2] = 0
        context = word_context(**arguments, backend=backend)
        mean = torch.nn.functional.normalize(arguments["words"][0], dim=-1).mean(0)
        torch.testing.assert_close(context[0, 1], mean, rtol=1e-5, atol=1e-6)
        assert context.isfinite().all()

    def test_strided_inputs(self, backend: str, device: str) -> None:
        regions = torch.randn(5, 4, 6, device=device).permute(2, 1, 0)[:, ::2]
        words = torch.randn(1, 7, 5, device=device).expand(6, 7, 5)
        found = word_context(regions, words, backend=backend)
        expected = word_context(regions.contiguous(), words.contiguous(), backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_autocast(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device)
        half = {k: v.detach().bfloat16() if k in ("regions", "words") else v for k, v in arguments.items()}
        expected = word_context(**half, backend=backend)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = word_context(**arguments, backend=backend)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        found.float().sum().backward()
        assert arguments["words"].grad.dtype == torch.float32

    def test_compiles_whole(self, backend: str, device: str) -> None:
        torch._dynamo.reset()
        arguments = make_inputs(SHAPES["tiny"], device=device)
        call = partial(word_context, backend=backend)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
        eager, graph = value_and_gradients(call, arguments), value_and_gradients(compiled, arguments)
        torch.testing.assert_close(graph, eager)

    def test_same_bits_twice(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device)
        first, second = (
            value_and_gradients(partial(word_context, backend=backend), arguments) for _ in range(2)
        )
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=0)

    def test_attention_is_a_distribution(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device)
        context, attention = word_context(**arguments, return_attention=True, backend=backend)
        torch.testing.assert_close(context, word_context(**arguments, backend=backend), rtol=1e-5, atol=1e-6)
        some = arguments["word_mask"].any(1)
        torch.testing.assert_close(attention.sum(2), some[:, None].expand(-1, 37).float())
        assert not attention.transpose(1, 2)[~arguments["word_mask"]].any()


def test_second_derivative_of_the_fused_attention_raises() -> None:
    arguments = make_inputs(SHAPES["tiny"])
    context = word_context(**arguments, backend="cpu")
    (gradient,) = torch.autograd.grad(context.square().sum(), arguments["words"], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@given(
    images=st.integers(1, 4), regions=st.integers(1, 9), words=st.integers(1, 12), width=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_order_and_length_do_not_matter(
    backend: str, images: int, regions: int, words: int, width: int, seed: int
) -> None:
    """Permuted words give the same context, permuted regions permute it, scaled vectors leave it."""
    arguments = make_inputs(Shape(images, regions, words, width), dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    of_regions, of_words = (torch.randperm(n, generator=generator) for n in (regions, words))
    expected = word_context(**arguments, backend=backend)[:, of_regions]
    arguments["regions"] = 7 * arguments["regions"][:, of_regions]
    arguments["words"] = 0.1 * arguments["words"][:, of_words]
    arguments["word_mask"] = arguments["word_mask"][:, of_words]
    torch.testing.assert_close(word_context(**arguments, backend=backend), expected, rtol=1e-9, atol=1e-9)


class TestDispatch:
    def test_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("JRL_BACKEND", raising=False)
        assert _dispatch.select("word_context", "auto", "word_context", torch.randn(2, 2)) == "cpu"

    def test_refusals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.randn(1, 2, 3)
        with pytest.raises(NotImplementedError, match="backend 'cuda' takes CUDA tensors, got cpu"):
            word_context(x, x, backend="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(NotImplementedError) as error:
            _dispatch._select("word_context", "auto", "word_context", "cuda", torch.float32)
        assert "cuda: PyTorch sees no CUDA GPU" in str(error.value)


X = torch.randn(2, 4, 3)
ALL = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "regions must be a tensor, got float 1.0"),
        ((X, X.int()), {}, TypeError, "words must be float32, bfloat16, float16 or float64, got torch.int32"),
        ((X[0], X), {}, ValueError, r"regions must have shape \[B, R, D\], got \[4, 3\]"),
        ((X, X[:1]), {}, ValueError, r"words must have shape \[B, T, D\] with B = 2, D = 3, got \[1, 4, 3\]"),
        ((X, X.half()), {}, TypeError, "words must be torch.float32 like regions, got torch.float16"),
        ((X, X.to("meta")), {}, ValueError, "words must be on cpu like regions, got meta"),
        ((X, X), {"word_mask": ALL.int()}, TypeError, "word_mask must be boolean"),
        (
            (X, X),
            {"word_mask": ALL[:, :3]},
            ValueError,
            r"word_mask must have shape \[B, T\] with B = 2, T = 4",
        ),
        ((X, X), {"attention_scale": "15"}, TypeError, "attention_scale must be a number or a 0-d tensor"),
        ((X, X), {"attention_scale": X}, ValueError, "attention_scale must be a 0-d tensor or a number"),
        ((X, X), {"backend": "triton"}, ValueError, "backend must be 'auto' or one of"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^word_context: .*{message}"):
        word_context(*arguments, **options)
