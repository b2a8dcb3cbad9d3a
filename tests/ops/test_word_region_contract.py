"""What every op owes besides its values: registration, compilation, autocast, determinism, refusals and their messages."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import attention_critic, word_region_scores
from jrl_kernels.ops.word_region.cases import BENCHMARK_SHAPES, SETTINGS, SHAPES, Shape, flops, make_inputs
from jrl_kernels.ops.word_region.settings import PRESETS
from tests.ops.conformance import BACKENDS, FUSED, leaves, value_and_gradients


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_opcheck(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of schema, fake tensors, autograd registration and AOT dispatch, on the calls the op makes."""
    calls: list[tuple[Any, ...]] = []
    real = torch.ops.jrl.word_region_forward

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(torch.ops.jrl, "word_region_forward", record)
    for name, shape, masks in (
        ("xmc_gan", SHAPES["tiny"], True),
        ("damsm", SHAPES["values"], True),
        ("info_ground", SHAPES["values"], False),
        ("dvsa", SHAPES["tiny"], True),
    ):
        arguments = make_inputs(shape, device=device, masks=masks, factors=True)
        word_region_scores(**arguments, pool="max", preset=name, backend=backend)
    monkeypatch.undo()
    assert len(calls) == 4
    for call in calls:
        detached = tuple(
            t.detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in call
        )
        torch.library.opcheck(real.default, detached)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("setting", ["damsm", "scan_i2t", "info_ground"])
def test_compiles_whole(backend: str, device: str, setting: str) -> None:
    torch._dynamo.reset()
    for shape in (SHAPES["tiny"], SHAPES["values"]):
        arguments = make_inputs(shape, device=device, masks=True)
        call = partial(word_region_scores, **SETTINGS[setting], backend=backend)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
        eager, graph = value_and_gradients(call, arguments), value_and_gradients(compiled, arguments)
        torch.testing.assert_close(graph, eager)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """A captured step replays on new numbers: nothing in it reads the GPU's memory on the host."""
    arguments = make_inputs(Shape(24, 20, 17, 36, 128), dtype=torch.bfloat16, device="cuda", masks=True)
    inputs = list(leaves(arguments).values())
    call = partial(word_region_scores, preset="damsm", backend="triton")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(call(**arguments).sum(), inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = call(**arguments)
        gradients = torch.autograd.grad(scores.sum(), inputs)
    with torch.no_grad():
        arguments["regions"].copy_(arguments["regions"].flip(0))
    graph.replay()
    expected = call(**arguments)
    torch.testing.assert_close(scores, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_same_bits_twice(backend: str, device: str) -> None:
    for setting, masks in itertools.product(("xmc_gan", "damsm", "dvsa"), (False, True)):
        arguments = make_inputs(Shape(21, 19, 9, 33, 24), device=device, masks=masks, factors=True)
        options = {k: v for k, v in SETTINGS[setting].items() if k not in arguments}
        call = partial(word_region_scores, **options, backend=backend)
        first, second = (value_and_gradients(call, arguments) for _ in range(2))
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=0)


class TestSecondDerivative:
    @pytest.mark.parametrize(("backend", "device"), FUSED)
    def test_fused_backward_refuses(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device)
        scores = word_region_scores(**arguments, backend=backend)
        (gradient,) = torch.autograd.grad(scores.sum(), arguments["words"], create_graph=True)
        with pytest.raises(NotImplementedError, match="word_region.*backend='reference'"):
            gradient.square().sum().backward()

    def test_reference_has_one(self) -> None:
        arguments = make_inputs(Shape(2, 2, 3, 3, 3), dtype=torch.float64, seed=2)
        for setting in ("xmc_gan", "damsm"):
            call = partial(word_region_scores, **SETTINGS[setting], backend="reference")
            assert torch.autograd.gradgradcheck(call, (arguments["regions"], arguments["words"]))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestAutocast:
    def test_operands_are_cast_and_attention_is_not(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["values"], device=device, masks=True, factors=True)
        half = {
            k: v.detach().bfloat16() if v.is_floating_point() and v.dim() else v for k, v in arguments.items()
        }
        call = partial(word_region_scores, normalize=False, backend=backend)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = call(**arguments)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, call(**half), rtol=0, atol=0)
        found.sum().backward()
        assert all(
            leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves(arguments).values()
        )

    def test_mixed_dtypes_meet_under_autocast(self, backend: str, device: str) -> None:
        x, y = torch.randn(2, 4, 3, device=device), torch.randn(2, 4, 3, device=device, dtype=torch.bfloat16)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert word_region_scores(x, y, backend=backend).isfinite().all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32(backend: str, device: str, dtype: torch.dtype) -> None:
    arguments = make_inputs(SHAPES["values"], dtype=dtype, device=device)
    for pool in ("logsumexp", "none"):
        scores = word_region_scores(**arguments, pool=pool, backend=backend)
        assert scores.dtype == torch.float32
        found = torch.autograd.grad(scores.sum(), list(leaves(arguments).values()))
        assert all(gradient.dtype == dtype for gradient in found)


class TestPresets:
    def test_an_option_overrides_the_preset(self) -> None:
        arguments = make_inputs(SHAPES["tiny"], masks=True)
        explicit = {
            "normalize": False, "prenormalize": "softmax", "attention_scale": 3.0, "match": "cosine",
            "pool": "logsumexp", "pool_scale": 7.0, "scale": 10.0,
        }  # fmt: skip
        found = word_region_scores(
            **arguments, preset="damsm", attention_scale=3.0, pool="logsumexp", pool_scale=7.0
        )
        torch.testing.assert_close(found, word_region_scores(**arguments, **explicit), rtol=0, atol=0)
        plain = word_region_scores(**arguments, preset="scan_t2i", prenormalize="none")
        torch.testing.assert_close(
            plain, word_region_scores(**arguments, attention_scale=9.0, pool_scale=6.0)
        )

    def test_the_two_ways_to_pool_by_logsumexp(self) -> None:
        arguments = make_inputs(SHAPES["tiny"])
        call = partial(word_region_scores, **arguments, pool_scale=4.0)
        torch.testing.assert_close(call(pool="logsumexp_undivided"), 4 * call(pool="logsumexp"))

    def test_info_ground_divides_by_the_root_of_the_width(self) -> None:
        arguments = make_inputs(SHAPES["values"])
        torch.testing.assert_close(
            word_region_scores(**arguments, preset="info_ground"),
            word_region_scores(
                **arguments, preset="mutual_information", pool="none", attention_scale=7**-0.5
            ),
        )

    def test_every_preset_has_a_setting(self) -> None:
        assert set(PRESETS) <= set(SETTINGS)


def test_costs_are_those_of_the_floors() -> None:
    """150 + 51 microseconds at 790 TFLOP/s for 128 pairs of 32 words with 36 regions of width 1024."""
    shape = BENCHMARK_SHAPES["cuda"][0]
    assert flops(shape, backward=False) == 2 * 128 * 128 * 32 * 36 * (1024 + 36)
    assert flops(shape, backward=True) / 790e12 == pytest.approx(201e-6, rel=0.01)


R, W = torch.randn(2, 4, 3), torch.randn(3, 5, 3)
FULL = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, W), {}, TypeError, "regions must be a tensor, got float 1.0"),
        (
            (R.long(), W),
            {},
            TypeError,
            "regions must be float32, bfloat16, float16 or float64, got torch.int64",
        ),
        ((R[0], W), {}, ValueError, r"regions must have shape \[B, R, D\], got \[4, 3\]"),
        ((R, W[..., :2]), {}, ValueError, r"words must have shape \[C, T, D\] with D = 3, got \[3, 5, 2\]"),
        ((R, W.double()), {}, TypeError, "words must be torch.float32 like regions, got torch.float64"),
        ((R, W.to("meta")), {}, ValueError, "words must be on cpu like regions, got meta"),
        ((R[:, :0], W), {}, ValueError, r"regions must have at least one on axis R, got \[2, 0, 3\]"),
        ((R, W[:, :0]), {}, ValueError, r"words must have at least one on axis T, got \[3, 0, 3\]"),
        (
            (R, W),
            {"region_values": R[:1]},
            ValueError,
            r"region_values must have shape \[B, R, D\] with B = 2, R = 4, D = 3, got \[1, 4, 3\]",
        ),
        ((R, W), {"word_values": W[..., :2]}, ValueError, r"word_values must have shape \[C, T, D\] with"),
        (
            (R, W),
            {"region_values": R[..., :2], "word_values": W},
            ValueError,
            r"word_values must have shape \[C, T, E\] with C = 3, T = 5, E = 2, got \[3, 5, 3\]",
        ),
        ((R, W), {"region_values": R.half()}, TypeError, "region_values must be torch.float32 like regions"),
        ((R, W), {"word_values": 1}, TypeError, "word_values must be a tensor, got int 1"),
        (
            (R, W),
            {"region_mask": FULL.float()},
            TypeError,
            "region_mask must be boolean, True for items that count",
        ),
        (
            (R, W),
            {"region_mask": FULL[:1]},
            ValueError,
            r"region_mask must have shape \[B, R\] with B = 2, R = 4",
        ),
        ((R, W), {"word_mask": FULL}, ValueError, r"word_mask must have shape \[C, T\] with C = 3, T = 5"),
        ((R, W), {"region_mask": FULL.to("meta")}, ValueError, "region_mask must be on cpu like regions"),
        ((R, W), {"normalize": 1}, TypeError, "normalize must be True or False, got int 1"),
        ((R, W), {"hard": "yes"}, TypeError, "hard must be True or False, got str 'yes'"),
        ((R, W), {"prenormalize": "l3norm"}, ValueError, r"prenormalize must be one of \['none', 'softmax'"),
        ((R, W), {"match": "l2"}, ValueError, r"match must be one of \['cosine', 'dot'\], got 'l2'"),
        ((R, W), {"pool": "median"}, ValueError, r"pool must be one of \['sum', 'mean', 'max', 'logsumexp'"),
        ((R, W), {"attend": "both"}, ValueError, r"attend must be one of \['regions', 'words'\], got 'both'"),
        ((R, W), {"preset": "clip"}, ValueError, r"preset must be one of \['xmc_gan', 'damsm'.*got 'clip'"),
        (
            (R, W),
            {"attention_scale": "5"},
            TypeError,
            "attention_scale must be a number or a 0-d tensor, got str",
        ),
        ((R, W), {"attention_scale": float("nan")}, ValueError, "attention_scale must be finite, got nan"),
        ((R, W), {"pool_scale": 0}, ValueError, "pool_scale must be finite and greater than 0, got 0"),
        ((R, W), {"pool_scale": R}, ValueError, r"pool_scale must be a 0-d tensor or a number, got shape"),
        ((R, W), {"scale": True}, TypeError, "scale must be a number or a 0-d tensor, got bool True"),
        ((R, W), {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ((R, W), {"backend": "cudnn"}, ValueError, "backend must be 'auto' or one of .*got 'cudnn'"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^word_region_scores: {message}"):
        word_region_scores(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((R[0], R, W, W), {}, ValueError, r"keys must have shape \[B, R, D\], got \[4, 3\]"),
        ((R, R, W[..., :2], W), {}, ValueError, r"queries must have shape \[C, T, D\] with D = 3"),
        ((R, None, W, W), {}, TypeError, "region_values must be a tensor, got NoneType None"),
        ((R, R, W, None), {}, TypeError, "word_values must be a tensor, got NoneType None"),
        (
            (R, R, W, W.half()),
            {},
            TypeError,
            "word_values must be torch.float32 like keys, got torch.float16",
        ),
        ((R, R, W, W), {"scale": "1"}, TypeError, "scale must be a number or a 0-d tensor, got str '1'"),
        (
            (R, R, W, W),
            {"scale": None},
            TypeError,
            "scale must be a number or a 0-d tensor, got NoneType None",
        ),
    ],
)
def test_messages_of_the_critic(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^attention_critic: {message}"):
        attention_critic(*arguments, **options)
