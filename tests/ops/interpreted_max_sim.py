"""Late interaction on CPU tensors, in Triton's interpreter. Run by test_max_sim_triton.py."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import max_sim, max_sim_varlen
from jrl_kernels.ops.max_sim.cases import Shape, make_inputs, pack
from tests.ops.conformance import assert_close_to_truth, cast, det, value_and_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")

# Tiles are 16 x 16, and 4 items of 4 groups at a time: groups of one tile and of several, one and several pieces of D.
ONE_TILE, SEVERAL, LONG_REGIONS, LONG_BOTH, SMALL = (
    Shape(3, 5, 13, 6, 16),
    Shape(2, 6, 21, 9, 19),
    Shape(2, 3, 37, 14, 5),
    Shape(2, 2, 18, 23, 7),
    Shape(2, 3, 18, 5, 4),
)


def judge(arguments: dict[str, Any], function: Any = max_sim, **options: Any) -> None:
    dtype = arguments["regions"].dtype
    call = partial(function, **options)
    found = value_and_gradients(partial(call, backend="triton"), arguments)
    plain = value_and_gradients(partial(call, backend="reference"), arguments)
    truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
    assert_close_to_truth(found, plain, truth, dtype)


class TestDirections:
    @pytest.mark.parametrize("direction", ["words", "regions", "both"])
    @pytest.mark.parametrize("shape", [ONE_TILE, SEVERAL, LONG_REGIONS, LONG_BOTH])
    def test_masked(self, shape: Shape, direction: str) -> None:
        judge(make_inputs(shape, mask=True), direction=direction, reduce="mean")

    @pytest.mark.parametrize("direction", ["words", "both"])
    def test_zeros_compete(self, direction: str) -> None:
        for shape in (ONE_TILE, LONG_REGIONS):
            judge(make_inputs(shape, mask=True), direction=direction, mask_mode="zero")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_halves(self, dtype: torch.dtype) -> None:
        judge(make_inputs(SMALL, dtype=dtype), direction="both", reduce="mean")
        judge(make_inputs(ONE_TILE, dtype=dtype, mask=True))

    def test_small_float16_gradients_keep_their_digits(self) -> None:
        """A loss over many captions has gradients of 1e-9, where float16 ends at 6e-8: their ratio to the largest counts."""
        arguments = make_inputs(ONE_TILE, dtype=torch.float16)
        scores = max_sim(**arguments, backend="triton")
        upstream = torch.logspace(-9, -1, scores.numel()).reshape(scores.shape)
        (found,) = torch.autograd.grad(scores * 100, arguments["regions"], upstream)
        wide = cast(arguments, torch.float64)
        (truth,) = torch.autograd.grad(
            max_sim(**wide, backend="reference") * 100, wide["regions"], upstream.double()
        )
        # float16 itself ends at 6e-8.
        torch.testing.assert_close(found.double(), truth, rtol=2e-3, atol=1e-7)


class TestPacked:
    @pytest.mark.parametrize("direction", ["words", "regions", "both"])
    def test_packed(self, direction: str) -> None:
        for shape in (Shape(5, 7, 11, 9, 16), Shape(3, 2, 30, 25, 5)):
            packed = pack(make_inputs(shape, mask=True))
            judge(packed, max_sim_varlen, direction=direction)

    def test_unknown_lengths(self) -> None:
        """As on a GPU, where a bound that is not given is the number of all rows."""
        packed = pack(make_inputs(Shape(4, 5, 9, 7, 6), mask=True))
        bounds = {f"max_seqlen_{name}": packed[name].shape[0] for name in ("regions", "words")}
        for direction in ("words", "both"):
            judge(packed, max_sim_varlen, direction=direction, **bounds)

    def test_four_bytes(self) -> None:
        packed = pack(make_inputs(Shape(2, 3, 5, 4, 6)))
        judge(packed, max_sim_varlen, max_seqlen_regions=1 << 15, direction="words")


class TestEdges:
    def test_golden(self) -> None:
        """DVSA's alignment scores."""
        mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
        scores = max_sim(
            det(3, 4, 5, a=0.37).float(), det(3, 6, 5, a=0.53).float(), word_mask=mask, backend="triton"
        )
        golden = [
            [12.74680145, 10.33750721, 5.76387411],
            [13.72352479, 9.33008119, 5.75864809],
            [12.27860086, 8.92894857, 4.95169404],
        ]
        torch.testing.assert_close(scores, torch.tensor(golden), rtol=2e-5, atol=0)

    @pytest.mark.parametrize("direction", ["words", "both"])
    def test_ties_go_to_the_first(self, direction: str) -> None:
        regions = torch.ones(2, 20, 3, requires_grad=True)
        words = torch.ones(3, 5, 3, requires_grad=True)
        max_sim(regions, words, direction=direction, backend="triton").sum().backward()
        assert regions.grad is not None
        # Every word of every caption goes to the first region; with "both" each region has its own share too.
        own = 0.0 if direction == "words" else 0.5 * 3
        first = 15.0 if direction == "words" else 7.5
        assert torch.equal(regions.grad[:, 1:], torch.full((2, 19, 3), own))
        assert torch.equal(regions.grad[:, 0], torch.full((2, 3), own + first))

    @pytest.mark.parametrize("side", ["regions", "words"])
    @pytest.mark.parametrize("direction", ["words", "both"])
    def test_nan(self, side: str, direction: str) -> None:
        arguments = make_inputs(SMALL, mask=True)
        mask = arguments[f"{side[:-1]}_mask"]
        mask[0, 2], mask[0, 3] = True, False
        with torch.no_grad():
            arguments[side][0, 3] = math.nan
        found = value_and_gradients(partial(max_sim, direction=direction, backend="triton"), arguments)
        assert not any(value.isnan().any() for value in found.values())
        with torch.no_grad():
            arguments[side][0, 2, 1] = math.nan
        found = value_and_gradients(partial(max_sim, direction=direction, backend="triton"), arguments)
        scores = found["output 0"] if side == "regions" else found["output 0"].T
        assert scores[0, :-1].isnan().all()
        assert not scores[1:].isnan().any()
        assert not found[f"d {side}"][~mask].any()

    def test_infinite_similarities(self) -> None:
        regions = torch.full((2, 20, 3), -math.inf)
        scores = max_sim(regions, torch.ones(2, 3, 3), backend="triton")
        assert torch.equal(scores, torch.full((2, 2), -math.inf))

    @pytest.mark.parametrize("lengths", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
    def test_empty(self, lengths: tuple[int, int, int]) -> None:
        groups, regions, words = lengths
        arguments = make_inputs(Shape(groups, 2, regions, words, 5))
        for direction in ("words", "both"):
            found = value_and_gradients(partial(max_sim, direction=direction, backend="triton"), arguments)
            assert found["output 0"].shape == (groups, 2)
            assert not any(value.any() for value in found.values())

    def test_each_gradient_alone_and_same_bits(self) -> None:
        arguments = make_inputs(SMALL, dtype=torch.bfloat16, mask=True)
        call = partial(max_sim, direction="both", backend="triton")
        everything, again = (value_and_gradients(call, arguments) for _ in range(2))
        for name in ("regions", "words"):
            alone = {
                k: v.detach() if k in ("regions", "words") and k != name else v for k, v in arguments.items()
            }
            found = value_and_gradients(call, alone)
            for value in (found, again):
                torch.testing.assert_close(value[f"d {name}"], everything[f"d {name}"], rtol=0, atol=0)
