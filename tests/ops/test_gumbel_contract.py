"""What the Gumbel ops owe besides their values: registration, compilation, autocast, determinism, refusals and their messages."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import gumbel_assign, gumbel_embed
from jrl_kernels.ops.gumbel.cases import (
    EMBED_SHAPES,
    SHAPES,
    EmbedShape,
    Shape,
    make_embed_inputs,
    make_inputs,
)
from tests.ops.conformance import BACKENDS, FUSED, value_and_gradients
from tests.ops.test_gumbel import embedding, pooled


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_opcheck(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of schema, fake tensors, autograd registration and AOT dispatch, on the calls the ops make."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for name in ("gumbel_assign_forward", "gumbel_embed_forward"):
        real = getattr(torch.ops.jrl, name)

        def record(*arguments: Any, real: Any = real) -> Any:
            calls.append((real.default, arguments))
            return real(*arguments)

        monkeypatch.setattr(torch.ops.jrl, name, record)
    gumbel_assign(**make_inputs(SHAPES["tiny"], device=device, mask=True), backend=backend)
    gumbel_assign(**make_inputs(SHAPES["tiny"], device=device, noise=False), hard=False, backend=backend)
    for hard in (True, False):
        gumbel_embed(**make_embed_inputs(EMBED_SHAPES["tiny"], device=device, hard=hard), backend=backend)
    monkeypatch.undo()
    assert len(calls) == 4
    for op, inputs in calls:
        torch.library.opcheck(op, inputs)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiles_whole(backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiler = "aot_eager" if device == "cpu" else "inductor"
    for function, arguments in (
        (pooled, make_inputs(SHAPES["tiny"], device=device, mask=True)),
        (embedding, make_embed_inputs(EMBED_SHAPES["tiny"], device=device)),
    ):
        call = partial(function, backend=backend)
        compiled = torch.compile(call, fullgraph=True, backend=compiler)
        torch.testing.assert_close(
            value_and_gradients(compiled, arguments), value_and_gradients(call, arguments)
        )

    def drawn(queries: torch.Tensor, keys: torch.Tensor) -> Any:
        return gumbel_assign(queries, keys, keys, return_soft=True, seed=5, backend=backend), gumbel_assign(
            queries, keys, keys, backend=backend
        )

    queries, keys = torch.randn(2, 3, 4, device=device), torch.randn(2, 5, 4, device=device)
    seeded, free = torch.compile(drawn, fullgraph=True, backend=compiler)(queries, keys)
    torch.testing.assert_close(seeded, drawn(queries, keys)[0])
    assert free.index.shape == (2, 5)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """A captured step replays on new numbers and, where the seed is not given, new noise."""
    arguments = make_inputs(Shape(4, 64, 196, 64, 64), dtype=torch.bfloat16, device="cuda")
    names = ("queries", "keys", "values", "scale")

    def step() -> tuple[torch.Tensor, ...]:
        out = pooled(**arguments)
        free = gumbel_assign(**{**arguments, "seed": None}).index
        return (out, free, *torch.autograd.grad(out.sum(), [arguments[name] for name in names]))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        arguments["keys"].copy_(arguments["keys"].flip(0))
        arguments["seed"].add_(1)
    graph.replay()
    first = found[1].clone()
    graph.replay()
    assert not torch.equal(first, found[1])
    expected = step()
    for i in (0, 2, 3, 4, 5):
        torch.testing.assert_close(found[i], expected[i])


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_same_bits_twice(backend: str, device: str) -> None:
    for hard in (True, False):
        for function, arguments in (
            (pooled, make_inputs(Shape(4, 40, 131, 33, 17), device=device)),
            (embedding, make_embed_inputs(EmbedShape(300, 70, 33, 3), device=device, hard=hard)),
        ):
            call = partial(function, backend=backend)
            first, second = (value_and_gradients(call, {**arguments, "hard": hard}) for _ in range(2))
            for name, value in first.items():
                torch.testing.assert_close(second[name], value, rtol=0, atol=0)


class TestSecondDerivative:
    @pytest.mark.parametrize(("backend", "device"), FUSED)
    def test_fused_backward_refuses(self, backend: str, device: str) -> None:
        for function, arguments, name in (
            (pooled, make_inputs(SHAPES["tiny"], device=device), "values"),
            (embedding, make_embed_inputs(EMBED_SHAPES["tiny"], device=device), "logits"),
        ):
            out = function(**arguments, backend=backend)
            (gradient,) = torch.autograd.grad(out.square().sum(), arguments[name], create_graph=True)
            with pytest.raises(NotImplementedError, match=r"gumbel_.*backend='reference'"):
                gradient.square().sum().backward()

    def test_reference_has_one(self) -> None:
        arguments = make_inputs(Shape(1, 2, 3, 2, 2), dtype=torch.float64)
        names = ("queries", "keys", "values")

        def assign(*tensors: torch.Tensor) -> torch.Tensor:
            given = dict(zip(names, tensors, strict=True))
            return pooled(**{**arguments, **given}, hard=False, backend="reference")

        assert torch.autograd.gradgradcheck(assign, tuple(arguments[name] for name in names))
        embed = make_embed_inputs(EmbedShape(2, 3, 2, 1), dtype=torch.float64, hard=False)

        def mixture(logits: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
            return embedding(**{**embed, "logits": logits, "codebook": codebook}, backend="reference")

        assert torch.autograd.gradgradcheck(mixture, (embed["logits"], embed["codebook"]))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestDtypes:
    def test_autocast_casts_operands_but_no_logits(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device)
        tensors = ("queries", "keys", "values")
        half = {k: v.detach().bfloat16() if k in tensors else v for k, v in arguments.items()}
        expected = pooled(**half, backend=backend)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = pooled(**arguments, backend=backend)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        found.sum().backward()
        assert all(arguments[name].grad.dtype == torch.float32 for name in (*tensors, "scale"))
        embed = make_embed_inputs(EMBED_SHAPES["ragged"], device=device)
        expected = embedding(**{**embed, "codebook": embed["codebook"].bfloat16()}, backend=backend)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = embedding(**embed, backend=backend)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_logits_and_codebook_may_differ(self, backend: str, device: str) -> None:
        arguments = make_embed_inputs(EMBED_SHAPES["ragged"], device=device)
        arguments["logits"] = arguments["logits"].detach().half().requires_grad_()
        found = value_and_gradients(partial(embedding, backend=backend), arguments)
        expected = value_and_gradients(partial(embedding, backend="reference"), arguments)
        assert found["output 0"].dtype == torch.float32 and found["d logits"].dtype == torch.float16
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=3e-3, atol=3e-3)


def test_nothing_of_the_assignment_s_size_is_saved() -> None:
    arguments = make_inputs(Shape(2, 50, 60, 4, 3))
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for hard in (True, False):
            pooled(**arguments, hard=hard, backend="cpu")
    assert sizes and max(sizes) < 2 * 50 * 60


Q, K, V = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6)
LOGITS, CODES = torch.randn(3, 7), torch.randn(7, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, K, V), {}, TypeError, "queries must be a tensor, got int 3"),
        (
            (Q.int(), K, V),
            {},
            TypeError,
            "queries must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        ((Q[0], K, V), {}, ValueError, r"queries must have shape \[B, G, D\], got \[3, 4\]"),
        (
            (Q, K[:1], V),
            {},
            ValueError,
            r"keys must have shape \[B, S, D\] with B = 2, D = 4, got \[1, 5, 4\]",
        ),
        (
            (Q, K, V[:, :4]),
            {},
            ValueError,
            r"values must have shape \[B, S, E\] with B = 2, S = 5, got \[2, 4, 6\]",
        ),
        ((Q[:, :0], K, V), {}, ValueError, r"queries must have a group and a width, got shape \[2, 0, 4\]"),
        ((Q, K.half(), V), {}, TypeError, "keys must be torch.float32 like queries, got torch.float16"),
        ((Q, K, V.half()), {}, TypeError, "values must be torch.float32 like queries, got torch.float16"),
        ((Q, K, V), {"tau": 0}, ValueError, "tau must be finite and greater than 0, got 0"),
        ((Q, K, V), {"tau": "1"}, TypeError, "tau must be a number, got str '1'"),
        ((Q, K, V), {"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        (
            (Q, K, V),
            {"scale": Q},
            ValueError,
            r"scale must be a 0-d tensor or a number, got shape \[2, 3, 4\]",
        ),
        ((Q, K, V), {"noise": 1}, TypeError, "noise must be True or False, got int 1"),
        ((Q, K, V), {"seed": 1.5}, TypeError, "seed must be an int, got float 1.5"),
        ((Q, K, V), {"seed": -1}, ValueError, "seed must be at least 0"),
        ((Q, K, V), {"seed": 1 << 63}, ValueError, "seed must be at least 0 and at most 9223372036854775807"),
        (
            (Q, K, V),
            {"seed": torch.ones(1)},
            TypeError,
            "seed must be an int or an int64 tensor, got torch.float32",
        ),
        (
            (Q, K, V),
            {"seed": torch.ones(2).long()},
            ValueError,
            r"seed must be 0-d or have one element, got shape \[2\]",
        ),
        (
            (Q, K, V),
            {"key_mask": V},
            TypeError,
            "key_mask must be boolean, True for items that count, got torch.float32",
        ),
        (
            (Q, K, V),
            {"key_mask": torch.ones(2, 4) > 0},
            ValueError,
            r"key_mask must have shape \[B, S\] with B = 2, S = 5, got \[2, 4\]",
        ),
        ((Q, K, V), {"backend": "metal"}, ValueError, "backend must be 'auto' or one of"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^gumbel_assign: .*{message}"):
        gumbel_assign(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS, 3), {}, TypeError, "codebook must be a tensor, got int 3"),
        ((LOGITS, CODES[0]), {}, ValueError, r"codebook must have shape \[V, D\], got \[2\]"),
        ((None, CODES), {}, TypeError, "logits must be a tensor, got NoneType None"),
        (
            (LOGITS.int(), CODES),
            {},
            TypeError,
            "logits must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        (
            (LOGITS[:, :6], CODES),
            {},
            ValueError,
            r"logits must have shape \[..., V\] with V = 7, got \[3, 6\]",
        ),
        (
            (LOGITS.double(), CODES),
            {},
            TypeError,
            "codebook must be float64 where logits is, got torch.float32",
        ),
        ((LOGITS, CODES), {"tau": -1.0}, ValueError, "tau must be finite and greater than 0, got -1.0"),
        ((LOGITS, CODES), {"k": 0}, ValueError, "k must be at least 1, got 0"),
        ((LOGITS, CODES), {"k": 8}, ValueError, "k must be at most V = 7, got 8"),
        ((LOGITS, CODES), {"k": 2, "hard": False}, ValueError, "k must be 1 with hard=False, got 2"),
        ((LOGITS, CODES), {"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_messages_of_embed(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^gumbel_embed: .*{message}"):
        gumbel_embed(*arguments, **options)
