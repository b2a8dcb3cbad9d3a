"""The Gumbel ops' Triton kernels on CPU tensors, in Triton's interpreter, whose tiles are 16 x 16.

Run by test_gumbel_triton.py, in processes that set TRITON_INTERPRET=1 before anything imports triton.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from jrl_kernels import gumbel_assign, gumbel_embed
from jrl_kernels.ops.gumbel import triton_kernel, triton_noise
from jrl_kernels.ops.gumbel.cases import EmbedShape, Shape, make_embed_inputs, make_inputs
from jrl_kernels.ops.gumbel.reference import gumbel_noise
from tests.ops.conformance import cast, value_and_gradients
from tests.ops.test_gumbel import embedding, judge, pooled
from tests.ops.test_gumbel_golden import KNOWN_ANSWERS, assert_group_vit, assign_attention, noise_of

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE, QUADS = Shape(2, 19, 21, 17, 18), Shape(2, 7, 20, 5, 33)


@triton.jit
def philox_kernel(counter_ptr, seed_ptr, words_ptr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * 4
    one = tl.arange(0, 1)
    words = tl.philox(
        tl.load(seed_ptr + tl.program_id(0)), tl.load(counter_ptr + at + one), tl.load(counter_ptr + at + 1 + one),
        tl.load(counter_ptr + at + 2 + one), tl.load(counter_ptr + at + 3 + one),
    )  # fmt: skip
    for j in tl.static_range(4):
        tl.store(words_ptr + at + j + one, words[j])


@triton.jit
def noise_kernel(  # type: ignore[no-untyped-def]
    seed_ptr,
    row_ptr,
    out_ptr,
    first_column,
    columns,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, ROWS)
    noise = triton_noise.gumbel_tile(
        tl.load(seed_ptr), tl.load(row_ptr + i), first_column, columns, 1, QUADS, BLOCK
    )
    tl.store(out_ptr + i[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], noise)


class TestNoise:
    def test_known_answers(self) -> None:
        counters, keys, words = (torch.tensor(rows) for rows in zip(*KNOWN_ANSWERS, strict=True))
        found = torch.zeros(len(words), 4, dtype=torch.int64).to(torch.uint32)
        # Two words of the key as one int64, whose sign bit is the upper word's.
        seeds = keys[:, 0] | (keys[:, 1] << 32)
        philox_kernel[(len(words),)](counters.to(torch.uint32), seeds, found)
        assert torch.equal(found.long(), words)

    @pytest.mark.parametrize("columns", [12, 13])
    def test_elements_beyond_32_bits(self, columns: int) -> None:
        """By quads and by single words, in rows so far down that the counter needs its second word."""
        rows, first, seed = torch.tensor([0, 3, (1 << 35) + 5, (1 << 40) + 1]), 4, (0xABCD1234 << 31) + 77
        found = torch.empty(4, 8)
        noise_kernel[(1,)](
            torch.tensor(seed), rows, found, first, columns, QUADS=columns % 4 == 0, ROWS=4, BLOCK=8
        )
        expected = noise_of(rows[:, None] * columns + first + torch.arange(8), seed, 1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)

    def test_noise_is_the_reference_s(self) -> None:
        for rows, codes in ((3, 8), (4, 13), (2, 37)):
            seed = torch.tensor((1 << 50) + 9)
            mixture = embedding(
                logits=torch.zeros(rows, codes),
                codebook=torch.eye(codes),
                hard=False,
                seed=seed,
                backend="triton",
            )
            noise = gumbel_noise((rows, codes), seed, 1, torch.float64)
            torch.testing.assert_close(mixture[:, 0].double(), noise.softmax(1), rtol=3e-6, atol=0)


class TestAssign:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("hard", [True, False])
    def test_against_float64(self, dtype: torch.dtype, hard: bool) -> None:
        settings = [
            (SHAPE, True, True, 0.0, 0.7),
            (QUADS, False, True, 1.0, 1.0),
            (Shape(1, 1, 1, 1, 1), False, False, 0.5, 2.0),
        ]
        for shape, mask, noise, eps, tau in settings if dtype == torch.float32 else settings[:1]:
            arguments = make_inputs(shape, dtype=dtype, mask=mask, noise=noise)
            judge(pooled, "triton", dtype, arguments, hard=hard, eps=eps, tau=tau)

    def test_images_in_several_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The gradient of the logits of one image at a time."""
        arguments = make_inputs(Shape(3, 5, 6, 4, 3))
        together = value_and_gradients(partial(pooled, backend="triton"), arguments)
        monkeypatch.setattr(triton_kernel, "GRADIENT_BYTES", 1)
        apart = value_and_gradients(partial(pooled, backend="triton"), arguments)
        for name, value in together.items():
            torch.testing.assert_close(apart[name], value, rtol=0, atol=0)

    def test_group_vit(self) -> None:
        out, found = assign_attention("cpu", torch.float32, backend="triton")
        assert_group_vit(out, found, 2e-5)

    def test_same_choices_and_masks(self) -> None:
        for mask, noise in ((False, False), (True, True)):
            arguments = make_inputs(SHAPE, mask=mask, noise=noise)
            if mask:
                with torch.no_grad():
                    for name in ("keys", "values"):
                        arguments[name][~arguments["key_mask"]] = math.nan
            found, expected = (gumbel_assign(**arguments, backend=b) for b in ("triton", "reference"))
            assert torch.equal(found.index, expected.index)
            torch.testing.assert_close(found.pooled, expected.pooled)
            gradients = torch.autograd.grad(found.pooled.sum(), [arguments["keys"], arguments["values"]])
            if mask:
                assert not any(gradient[~arguments["key_mask"]].any() for gradient in gradients)

    @pytest.mark.parametrize("hard", [True, False])
    def test_edges(self, hard: bool) -> None:
        for shape in (Shape(0, 3, 4, 2, 2), Shape(2, 3, 0, 2, 2), Shape(2, 3, 4, 2, 0)):
            found = value_and_gradients(partial(pooled, hard=hard, backend="triton"), make_inputs(shape))
            assert not any(value.any() for value in found.values())
        arguments = make_inputs(Shape(2, 3, 5, 2, 4))
        mask = torch.zeros(2, 5, dtype=torch.bool)
        found = value_and_gradients(partial(pooled, hard=hard, key_mask=mask, backend="triton"), arguments)
        assert not any(value.any() for value in found.values())
        for name in ("queries", "values", "scale"):
            arguments = make_inputs(Shape(2, 3, 5, 2, 4))
            with torch.no_grad():
                arguments[name].view(-1)[0] = math.nan
            out = pooled(**arguments, hard=hard, backend="triton")
            (gradient,) = torch.autograd.grad(out.sum(), arguments["keys"])
            assert out.isnan().any() and gradient.isnan().any()

    def test_ties_and_strides(self) -> None:
        # Small integers: their products are equal however a BLAS orders them.
        queries, keys = torch.ones(2, 20, 3), torch.arange(54.0).reshape(2, 9, 3)
        assert not gumbel_assign(queries, keys, keys, noise=False, backend="triton").index.any()
        wide = torch.randn(2, 8, 22)
        strided = (
            wide.mT[:, ::2, 1:7],
            torch.randn(1, 9, 6).expand(2, 9, 6),
            torch.randn(9, 2, 5).transpose(0, 1),
        )
        packed = [tensor.contiguous() for tensor in strided]
        found, expected = (gumbel_assign(*tensors, seed=5, backend="triton") for tensors in (strided, packed))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_soft_groups_of_hardly_any_weight(self) -> None:
        arguments = make_inputs(Shape(1, 19, 18, 16, 5), scale=3.0)
        arguments["scale"] = arguments["scale"].detach()
        call = partial(pooled, hard=False)
        truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
        found = value_and_gradients(partial(call, backend="triton"), arguments)
        for name, value in truth.items():
            size = float(value.abs().max())
            torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-3 * size)


class TestEmbed:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("hard", [True, False])
    def test_against_float64(self, dtype: torch.dtype, hard: bool) -> None:
        settings = [
            (EmbedShape(18, 37, 19, 3), True, 0.6),
            (EmbedShape(5, 20, 4, 1), True, 1.0),
            (EmbedShape(1, 1, 1, 1), False, 2.0),
        ]
        for shape, noise, tau in settings if dtype == torch.float32 else settings[:1]:
            arguments = make_embed_inputs(shape, dtype=dtype, hard=hard, noise=noise)
            judge(embedding, "triton", dtype, arguments, tau=tau)

    def test_more_entries_than_a_chunk_holds(self) -> None:
        """Chunks are 16 codes: their candidates are merged, minus infinity among them."""
        logits = torch.randn(3, 37).masked_fill(torch.rand(3, 37) < 0.4, -math.inf)
        for k in (1, 5, 20, 37):
            found, expected = (
                gumbel_embed(logits, torch.randn(37, 2), k=k, noise=False, backend=b)[1]
                for b in ("triton", "reference")
            )
            assert torch.equal(found, expected)

    def test_ties_and_nan(self) -> None:
        logits = torch.zeros(2, 40)
        logits[1, 33] = math.nan
        logits.requires_grad_()
        out, index = gumbel_embed(logits, torch.randn(40, 3), k=20, noise=False, backend="triton")
        assert index[0].tolist() == list(range(20)) and (index >= 0).all() and (index < 40).all()
        (gradient,) = torch.autograd.grad(out.sum(), logits)
        assert out[1].isnan().all() and gradient[1].isnan().all()
        assert not out[0].isnan().any() and not gradient[0].isnan().any()

    def test_empty(self) -> None:
        for rows, width, hard in itertools.product((0, 3), (0, 2), (True, False)):
            arguments = {
                "logits": torch.randn(rows, 5, requires_grad=True),
                "codebook": torch.randn(5, width, requires_grad=True),
            }
            found = value_and_gradients(partial(embedding, hard=hard, backend="triton"), arguments)
            assert found["output 0"].shape == (rows, 1, width)
            assert not found["d logits"].any() or (rows and width)
            assert rows > 0 or not found["d codebook"].any()
