"""Values and gradients of the Gumbel ops: float64 truth, every gradient, properties."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jrl_kernels import gumbel_assign, gumbel_embed
from jrl_kernels.ops.gumbel.cases import (
    EMBED_SHAPES,
    SHAPES,
    EmbedShape,
    Shape,
    make_embed_inputs,
    make_inputs,
)
from tests.ops.conformance import (
    BACKENDS,
    FUSED,
    FUSED_DTYPES,
    assert_close_to_truth,
    cast,
    value_and_gradients,
)


def pooled(**arguments: Any) -> Tensor:
    return gumbel_assign(**arguments).pooled


def embedding(**arguments: Any) -> Tensor:
    return gumbel_embed(**arguments)[0]


def exact_in_any_dtype(output: Tensor) -> list[Tensor]:
    """An upstream gradient for an output that comes in the inputs' dtype: rounded to it, the truth would be another's."""
    return [((torch.arange(output.numel(), device=output.device) * 37 % 64) / 64 + 0.5).reshape(output.shape)]


def judge(
    function: Callable[..., Tensor],
    backend: str,
    dtype: torch.dtype,
    arguments: dict[str, Any],
    **options: Any,
) -> None:
    """`arguments` are in `dtype`; the truth is the reference on the same numbers in float64."""
    call = partial(function, **options)
    exact = cast(arguments, torch.float64)
    upstream = exact_in_any_dtype(call(**exact, backend="reference"))
    fused = value_and_gradients(partial(call, backend=backend), arguments, upstream)
    plain = value_and_gradients(partial(call, backend="reference"), arguments, upstream)
    truth = value_and_gradients(partial(call, backend="reference"), exact, upstream)
    assert_close_to_truth(fused, plain, truth, dtype)


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_assign_against_float64(
    backend: str, device: str, dtype: torch.dtype, shape: str, nan_filled_allocations: None
) -> None:
    for hard, mask, (eps, tau, noise) in itertools.product(
        (True, False), (False, True), ((0.0, 1.0, True), (1.0, 0.6, False), (0.5, 2.0, True))
    ):
        arguments = make_inputs(SHAPES[shape], dtype=dtype, device=device, mask=mask, noise=noise)
        judge(pooled, backend, dtype, arguments, hard=hard, eps=eps, tau=tau)


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("shape", EMBED_SHAPES)
def test_embed_against_float64(
    backend: str, device: str, dtype: torch.dtype, shape: str, nan_filled_allocations: None
) -> None:
    for hard, tau, noise in itertools.product((True, False), (1.0, 0.3), (True, False)):
        arguments = make_embed_inputs(EMBED_SHAPES[shape], dtype=dtype, device=device, hard=hard, noise=noise)
        judge(embedding, backend, dtype, arguments, tau=tau)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_many_tiles(
    backend: str, device: str, nan_filled_allocations: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one tile in every direction; on a CPU also more than one of images and of rows."""
    from jrl_kernels.ops.gumbel import cpu

    monkeypatch.setattr(cpu, "TILE_BYTES", 4000)
    for hard in (True, False):
        for shape in (Shape(3, 150, 201, 70, 131), Shape(5, 40, 132, 33, 17)):
            arguments = make_inputs(shape, device=device, mask=True)
            # Its gradient, a sum over all tiles of what mostly cancels, has a test of its own.
            arguments["scale"] = arguments["scale"].detach()
            judge(pooled, backend, torch.float32, arguments, hard=hard)
        arguments = make_embed_inputs(EmbedShape(133, 9001, 130, 3), device=device, hard=hard)
        judge(embedding, backend, torch.float32, arguments)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_gradient_of_the_scale_over_many_tiles(backend: str, device: str) -> None:
    for hard, groups in ((True, 40), (False, 40), (True, 150)):
        arguments = make_inputs(Shape(5, groups, 132, 33, 17), device=device)
        call = partial(pooled, hard=hard)
        truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
        found = value_and_gradients(partial(call, backend=backend), arguments)
        terms = arguments["queries"].detach().double() * truth["d queries"] / arguments["scale"].detach()
        error = abs(found["d scale"].double() - truth["d scale"])
        assert float(error) <= 1e-6 * float(terms.abs().sum())


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_the_same_choices_as_the_reference(backend: str, device: str) -> None:
    for shape, noise in itertools.product(SHAPES.values(), (True, False)):
        arguments = make_inputs(shape, device=device, mask=True, noise=noise)
        found = gumbel_assign(**arguments, return_soft=True, backend=backend)
        expected = gumbel_assign(**arguments, return_soft=True, backend="reference")
        assert torch.equal(found.index, expected.index)
        assert found.index.dtype == torch.int64
        torch.testing.assert_close(found.soft, expected.soft)
    for embed_shape, noise in itertools.product(EMBED_SHAPES.values(), (True, False)):
        arguments = make_embed_inputs(embed_shape, device=device, noise=noise)
        assert torch.equal(
            gumbel_embed(**arguments, backend=backend)[1], gumbel_embed(**arguments, backend="reference")[1]
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("hard", [True, False])
def test_gradcheck_of_the_soft_forms(backend: str, hard: bool) -> None:
    """Soft: the true gradients. Hard: of what is differentiable as it stands, the values and the entries."""
    arguments = make_inputs(Shape(2, 3, 5, 4, 3), dtype=torch.float64, mask=True, scale=0.7)
    embed_arguments = make_embed_inputs(EmbedShape(4, 6, 3, 2), dtype=torch.float64, hard=hard)
    for eps in (0.0, 1.0):
        names = ("values",) if hard else ("queries", "keys", "values", "scale")

        def assign(*tensors: Tensor, eps: float = eps, names: tuple[str, ...] = names) -> Tensor:
            given = dict(zip(names, tensors, strict=True))
            return pooled(**{**arguments, **given}, eps=eps, tau=0.8, hard=hard, backend=backend)

        assert torch.autograd.gradcheck(assign, tuple(arguments[name] for name in names))
    embed_names = ("codebook",) if hard else ("logits", "codebook")

    def embed(*tensors: Tensor) -> Tensor:
        given = dict(zip(embed_names, tensors, strict=True))
        return embedding(**{**embed_arguments, **given}, tau=0.8, backend=backend)

    assert torch.autograd.gradcheck(embed, tuple(embed_arguments[name] for name in embed_names))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_straight_through(backend: str, device: str) -> None:
    """The hard op's gradient is that of the formula with A's gradient for Â's, written out here without autograd."""
    arguments = make_inputs(Shape(2, 4, 9, 5, 6), device=device)
    q, k, v, scale = (arguments[n].detach().double() for n in ("queries", "keys", "values", "scale"))
    found = value_and_gradients(partial(pooled, eps=0.5, tau=0.7, backend=backend), arguments)
    index = gumbel_assign(**arguments, backend="reference").index
    du = torch.linspace(0.5, 1.5, 2 * 4 * 6, device=device).reshape(2, 4, 6).double()
    from jrl_kernels.ops.gumbel.reference import gumbel_noise

    noise = gumbel_noise((2, 4, 9), arguments["seed"], 0, torch.float64)
    a = ((scale * q @ k.mT + noise) / 0.7).softmax(1)
    hot = torch.nn.functional.one_hot(index, 4).mT.double()
    count = hot.sum(2, keepdim=True) + 0.5
    u = hot @ v / count
    da = (du @ v.mT - (du * u).sum(2, keepdim=True)) / count
    dl = a * (da - (a * da).sum(1, keepdim=True)) / 0.7
    expected = {
        "output 0": u,
        "d queries": scale * dl @ k,
        "d keys": scale * dl.mT @ q,
        "d values": hot.mT @ (du / count),
        "d scale": (dl * (q @ k.mT)).sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_straight_through_of_several_entries(backend: str, device: str) -> None:
    arguments = make_embed_inputs(EmbedShape(5, 9, 4, 3), device=device)
    found = value_and_gradients(partial(embedding, tau=0.7, backend=backend), arguments)
    logits, table = arguments["logits"].detach().double(), arguments["codebook"].detach().double()
    from jrl_kernels.ops.gumbel.reference import gumbel_noise

    z = logits + gumbel_noise((5, 9), arguments["seed"], 1, torch.float64)
    index = z.topk(3, dim=1).indices
    p = (z / 0.7).softmax(1)
    de = torch.linspace(0.5, 1.5, 5 * 3 * 4, device=device).reshape(5, 3, 4).double()
    dlogits, dtable = torch.zeros_like(p), torch.zeros_like(table)
    for row in range(5):
        for j in range(3):
            da = table @ de[row, j]
            dlogits[row] += p[row] * (da - p[row] @ da) / 0.7
            dtable[index[row, j]] += de[row, j]
    expected = {"output 0": table[index], "d logits": dlogits, "d codebook": dtable}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_each_gradient_alone(backend: str, device: str) -> None:
    for hard in (True, False):
        for function, arguments, names in (
            (pooled, make_inputs(SHAPES["ragged"], device=device), ("queries", "keys", "values", "scale")),
            (
                embedding,
                make_embed_inputs(EMBED_SHAPES["ragged"], device=device, hard=hard),
                ("logits", "codebook"),
            ),
        ):
            arguments["hard"] = hard
            call = partial(function, backend=backend)
            everything = value_and_gradients(call, arguments)
            for name in names:
                alone = {k: v.detach() if k in names and k != name else v for k, v in arguments.items()}
                found = value_and_gradients(call, alone)
                torch.testing.assert_close(found[f"d {name}"], everything[f"d {name}"], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
class TestProperties:
    sizes = st.integers(1, 12)

    @given(images=sizes, groups=sizes, tokens=sizes, depth=sizes, hard=st.booleans(), seed=sizes)
    def test_permuting_tokens_and_groups(
        self, backend: str, images: int, groups: int, tokens: int, depth: int, hard: bool, seed: int
    ) -> None:
        arguments = make_inputs(
            Shape(images, groups, tokens, depth, 3), dtype=torch.float64, noise=False, seed=seed
        )
        straight = value_and_gradients(partial(pooled, hard=hard, eps=0.5, backend=backend), arguments)
        generator = torch.Generator().manual_seed(seed)
        order = {
            n: torch.randperm(s, generator=generator) for n, s in (("queries", groups), ("keys", tokens))
        }
        order["values"] = order["keys"]
        permuted = {
            n: v.detach()[:, order[n]].requires_grad_() if n in order else v for n, v in arguments.items()
        }
        weights = torch.linspace(0.5, 1.5, images * groups * 3).reshape(images, groups, 3)[
            :, order["queries"]
        ]
        found = value_and_gradients(partial(pooled, hard=hard, eps=0.5, backend=backend), permuted, [weights])
        for name in order:
            expected = straight[f"d {name}"][:, order[name]]
            torch.testing.assert_close(found[f"d {name}"], expected, rtol=1e-9, atol=1e-9)
        expected = straight["output 0"][:, order["queries"]]
        torch.testing.assert_close(found["output 0"], expected, rtol=1e-9, atol=1e-9)

    @given(rows=sizes, codes=sizes, shift=st.floats(-50, 50), hard=st.booleans(), seed=sizes)
    def test_shifting_logits(
        self, backend: str, rows: int, codes: int, shift: float, hard: bool, seed: int
    ) -> None:
        arguments = make_embed_inputs(
            EmbedShape(rows, codes, 3, min(2, codes)), dtype=torch.float64, hard=hard
        )
        straight = value_and_gradients(partial(embedding, backend=backend), arguments)
        arguments["logits"] = (arguments["logits"].detach() + shift).requires_grad_()
        found = value_and_gradients(partial(embedding, backend=backend), arguments)
        for name, value in straight.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
        assert float(found["d logits"].sum(1).abs().max()) < 1e-9

    @given(tokens=sizes, kept=sizes, hard=st.booleans(), seed=sizes)
    def test_a_masked_token_might_as_well_not_be_there(
        self, backend: str, tokens: int, kept: int, hard: bool, seed: int
    ) -> None:
        kept = min(kept, tokens)
        arguments = make_inputs(Shape(2, 3, tokens, 4, 5), dtype=torch.float64, noise=False, seed=seed)
        short = {
            n: v.detach()[:, :kept].requires_grad_() if n in ("keys", "values") else v
            for n, v in arguments.items()
        }
        with torch.no_grad():
            arguments["keys"][:, kept:] = torch.nan
            arguments["values"][:, kept:] = torch.inf
        mask = (torch.arange(tokens) < kept).expand(2, tokens)
        call = partial(pooled, hard=hard, backend=backend)
        found, expected = (
            value_and_gradients(partial(call, key_mask=mask), arguments),
            value_and_gradients(call, short),
        )
        for name, value in expected.items():
            got = found[name]
            if name in ("d keys", "d values"):
                assert not got[:, kept:].any()
                got = got[:, :kept]
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9)
        index = gumbel_assign(**arguments, key_mask=mask, hard=hard, backend=backend).index
        assert (index[:, kept:] == -1).all() and (index[:, :kept] >= 0).all()
