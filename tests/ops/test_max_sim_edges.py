"""Empty, masked, tied and extreme inputs of late interaction."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from jrl_kernels import max_sim, max_sim_varlen
from jrl_kernels.ops.max_sim.cases import SHAPES, Shape, make_inputs, pack
from tests.ops.conformance import BACKENDS, assert_close_to_truth, cast, value_and_gradients

DIRECTIONS = ("words", "regions", "both")


@pytest.mark.usefixtures("nan_filled_allocations")
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestEdges:
    @pytest.mark.parametrize(
        "shape",
        [
            Shape(0, 3, 4, 5, 6),
            Shape(3, 0, 4, 5, 6),
            Shape(3, 2, 0, 5, 6),
            Shape(3, 2, 4, 0, 6),
            Shape(2, 3, 4, 5, 0),
        ],
    )
    def test_empty(self, backend: str, device: str, shape: Shape) -> None:
        arguments = make_inputs(shape, device=device)
        for direction in DIRECTIONS:
            for reduce in ("sum", "mean"):
                call = partial(max_sim, direction=direction, reduce=reduce, backend=backend)
                found = value_and_gradients(call, arguments)
                assert found["output 0"].shape == shape[:2]
                assert not any(value.any() for value in found.values())

    def test_empty_sequences(self, backend: str, device: str) -> None:
        """An empty image or caption scores 0; the others score as if alone."""
        regions = torch.randn(7, 5, device=device, requires_grad=True)
        words = torch.randn(4, 5, device=device, requires_grad=True)
        of_regions = torch.tensor([0, 0, 3, 3, 7, 7], device=device)
        of_words = torch.tensor([0, 4, 4], dtype=torch.int32, device=device)
        for direction in DIRECTIONS:
            options = {"direction": direction, "reduce": "mean", "backend": backend}
            scores = max_sim_varlen(regions, words, of_regions, of_words, **options)
            expected = torch.zeros(5, 2, device=device)
            expected[1, 0] = max_sim(regions[None, :3], words[None], **options)
            expected[3, 0] = max_sim(regions[None, 3:], words[None], **options)
            torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
        nothing = torch.zeros(3, dtype=torch.int64, device=device)
        scores = max_sim_varlen(regions[:0], words, nothing, of_words, backend=backend)
        assert torch.equal(scores, torch.zeros(2, 2, device=device))
        (gradient,) = torch.autograd.grad(scores.sum(), words)
        assert not gradient.any()

    def test_everything_masked(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device)
        for mode in ("exclude", "zero"):
            for name in ("region_mask", "word_mask"):
                side = arguments["regions" if name == "region_mask" else "words"]
                mask = torch.zeros(side.shape[:2], dtype=torch.bool, device=device)
                for direction in DIRECTIONS:
                    call = partial(
                        max_sim, direction=direction, reduce="mean", mask_mode=mode, backend=backend
                    )
                    found = value_and_gradients(call, {**arguments, name: mask})
                    assert not any(value.any() for value in found.values())

    def test_padding_may_hold_anything(self, backend: str, device: str) -> None:
        for mode in ("exclude", "zero"):
            arguments = make_inputs(SHAPES["ragged"], device=device, mask=True)
            clean = {}
            for direction in DIRECTIONS:
                call = partial(max_sim, direction=direction, mask_mode=mode, backend=backend)
                clean[direction] = value_and_gradients(call, arguments)
            with torch.no_grad():
                arguments["regions"][~arguments["region_mask"]] = math.nan
                arguments["words"][~arguments["word_mask"]] = math.inf
            for direction in DIRECTIONS:
                call = partial(max_sim, direction=direction, mask_mode=mode, backend=backend)
                found = value_and_gradients(call, arguments)
                for name, value in found.items():
                    torch.testing.assert_close(value, clean[direction][name], rtol=0, atol=0)

    def test_nan_reaches_the_output(self, backend: str, device: str) -> None:
        for side in ("regions", "words"):
            for direction in DIRECTIONS:
                arguments = make_inputs(SHAPES["ragged"], device=device)
                with torch.no_grad():
                    arguments[side][1, 3, 2] = math.nan
                call = partial(max_sim, direction=direction, backend=backend)
                found = value_and_gradients(call, arguments)
                scores = found["output 0"] if side == "regions" else found["output 0"].T
                assert scores[1].isnan().all()
                assert not scores[0].isnan().any() and not scores[2:].isnan().any()
                # Its own items get the gradients of what they met; those of the other side meet a NaN.
                assert found["d words" if side == "regions" else "d regions"].isnan().any()

    def test_infinite_similarities(self, backend: str, device: str) -> None:
        words = torch.ones(2, 3, 3, device=device)
        for value in (math.inf, -math.inf):
            regions = torch.full((2, 20, 3), value, device=device)
            for direction in DIRECTIONS:
                scores = max_sim(regions, words, direction=direction, backend=backend)
                assert torch.equal(scores, torch.full((2, 2), value, device=device))

    def test_ties_go_to_the_first(self, backend: str, device: str) -> None:
        regions = torch.ones(2, 40, 3, device=device, requires_grad=True)
        words = torch.ones(3, 5, 3, device=device, requires_grad=True)
        of_regions, of_words = torch.autograd.grad(
            max_sim(regions, words, backend=backend).sum(), (regions, words)
        )
        assert torch.equal(of_words, torch.full_like(words, 2.0))
        assert not of_regions[:, 1:].any()
        assert torch.equal(of_regions[:, 0], torch.full_like(regions[:, 0], 15.0))
        mask = torch.ones(2, 40, dtype=torch.bool, device=device)
        mask[:, 0] = False
        scores = max_sim(regions, words, region_mask=mask, backend=backend)
        (of_regions,) = torch.autograd.grad(scores.sum(), regions)
        assert torch.equal(of_regions.sum(2).nonzero()[:, 1], torch.ones(2, dtype=torch.int64, device=device))

    def test_a_masked_item_that_ties_takes_no_gradient(self, backend: str, device: str) -> None:
        """With "zero" the similarity 0 of a masked region beats later ones of 0, and is beaten by earlier ones."""
        words = torch.ones(1, 1, 2, device=device)
        for first, expected in ((True, 0.0), (False, 1.0)):
            regions = torch.zeros(1, 2, 2, device=device, requires_grad=True)
            mask = torch.tensor([[not first, first]], device=device)
            scores = max_sim(regions, words, region_mask=mask, mask_mode="zero", backend=backend)
            (gradient,) = torch.autograd.grad(scores.sum(), regions)
            assert float(gradient.sum()) == 2 * expected

    def test_extreme_scale(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device)
        arguments = {name: (100 * value).detach().requires_grad_() for name, value in arguments.items()}
        for direction in DIRECTIONS:
            found, truth = (
                value_and_gradients(
                    partial(max_sim, direction=direction, backend=which), cast(arguments, dtype)
                )
                for which, dtype in ((backend, torch.float32), ("reference", torch.float64))
            )
            assert_close_to_truth(found, found, truth, torch.float32)

    def test_strided_and_expanded_inputs(self, backend: str, device: str) -> None:
        regions = torch.randn(4, 6, 9, device=device).permute(2, 1, 0)[:, ::2]
        words = torch.randn(1, 5, 4, device=device).expand(3, 5, 4)
        mask = torch.tensor([True, False, True], device=device).expand(9, 3)
        for direction in DIRECTIONS:
            options = {"direction": direction, "backend": backend}
            found = max_sim(regions, words, region_mask=mask, **options)
            expected = max_sim(
                regions.contiguous(), words.contiguous(), region_mask=mask.contiguous(), **options
            )
            tolerance = 1e-6 if backend == "reference" else 0
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        packed = pack(make_inputs(SHAPES["ragged"], device=device))
        wide = torch.cat([packed["regions"], packed["regions"]], 1).detach()[:, ::2]
        offsets = packed["cu_seqlens_regions"].repeat_interleave(2)[::2], packed["cu_seqlens_words"]
        found = max_sim_varlen(wide, packed["words"][:, : wide.shape[1]], *offsets, backend=backend)
        expected = max_sim_varlen(
            wide.contiguous(), packed["words"][:, : wide.shape[1]].contiguous(), *offsets, backend=backend
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_float16_keeps_small_gradients(self, backend: str, device: str) -> None:
        """Upstream gradients below what float16 holds, next to others that it does hold."""
        arguments = make_inputs(SHAPES["ragged"], dtype=torch.float16, device=device)
        scores = max_sim(**arguments, backend=backend)
        upstream = torch.logspace(-9, -1, scores.numel(), device=device).reshape(scores.shape)
        (found,) = torch.autograd.grad(scores * 100, arguments["regions"], upstream)
        wide = cast(arguments, torch.float64)
        exact = max_sim(**wide, backend="reference")
        (truth,) = torch.autograd.grad(exact * 100, wide["regions"], upstream.double())
        # float16 itself ends at 6e-8.
        torch.testing.assert_close(found.double(), truth, rtol=2e-3, atol=1e-7)


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
