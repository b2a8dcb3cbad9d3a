"""The bounds of the mutual information on CPU tensors in Triton's interpreter, whose tiles are 16 x 16.

Run by test_mutual_information_triton.py, in processes that set TRITON_INTERPRET=1 before anything imports triton.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import _triton_launch as triton_launch
from jrl_kernels import mutual_information
from jrl_kernels._sweep import Source
from jrl_kernels.ops.mutual_information import triton_kernel
from jrl_kernels.ops.mutual_information.cases import SHAPES, Shape, make_inputs
from jrl_kernels.ops.mutual_information.sweep import Images
from tests.ops.conformance import assert_close_to_truth, cast, det, value_and_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")

HALVES_AND_FLOAT = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS: list[dict[str, Any]] = [
    {"bound": "nce"},
    {"bound": "nce", "direction": "y_to_x", "own_logit": -1.0},
    {"bound": "nce", "direction": "both"},
    {"bound": "jsd"},
    {"bound": "dv"},
]
CROSSING = Shape(3, 7, 11, 19)
"""21 x 33 scores: several tiles each way, and own blocks that cross their edges."""


def judge(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    found, plain, truth = (
        value_and_gradients(partial(mutual_information, backend=backend), cast(arguments, precision))
        for backend, precision in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
    )
    assert_close_to_truth(found, plain, truth, dtype)


class TestValues:
    def test_golden(self) -> None:
        """Deep InfoMax's official code (nce, jsd) and formula (dv)."""
        local, summary = (
            features.mT.contiguous().float() for features in (det(3, 5, 4, a=0.37), det(3, 5, 1, a=0.53))
        )
        call = partial(mutual_information, backend="triton")
        loss = math.log(9) - float(call(summary, local, own_logit=-10.0))
        assert loss == pytest.approx(1.9420820162, rel=2e-5)
        assert float(call(local, summary, bound="jsd")) == pytest.approx(0.1413780092, rel=2e-5)
        assert float(call(local, summary, bound="dv")) == pytest.approx(0.3107091438, rel=2e-5)

    @pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
    @pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
    def test_against_float64(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        cases = ((False, 100.0), (True, 4.0))
        for masks, scale in cases if dtype == torch.float32 else cases[1:]:
            judge(make_inputs(CROSSING, dtype=dtype, masks=masks, scale=scale) | options, dtype)

    @pytest.mark.parametrize("shape", ["one", "single image", "global", "local and global"])
    def test_shapes(self, shape: str) -> None:
        for options in VARIANTS:
            if options["bound"] == "nce" or SHAPES[shape].images > 1:
                judge(make_inputs(SHAPES[shape]) | options, torch.float32)


class TestParts:
    @pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
    @pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
    def test_many_chunks(
        self, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Partials of one column of tiles at a time, and a buffer for the gradient of two tiles."""
        monkeypatch.setattr(triton_kernel, "GRADIENT_BYTES", 16 * 32 * dtype.itemsize)
        monkeypatch.setattr(triton_launch, "PARTIALS_BYTES", 1)
        judge(make_inputs(CROSSING, dtype=dtype, masks=True) | options, dtype)

    @pytest.mark.parametrize("shift", [-60.0, -18.0, -3.0, 0.0, 40.0])
    def test_softplus_keeps_its_digits(self, shift: float) -> None:
        x, y = torch.ones(20, 1), torch.linspace(shift, shift + 1, 18)[:, None]
        images = Images(torch.zeros(20, dtype=torch.int32), torch.ones(18, dtype=torch.int32))
        sums = triton_kernel.softplus_sums(Source(x, y, None, torch.tensor(1.0)), images)
        exact = torch.nn.functional.softplus(y.double(), threshold=1000).sum()
        torch.testing.assert_close(sums.double(), exact.expand(20), rtol=1e-5, atol=0)

    def test_same_bits_twice(self) -> None:
        for options in VARIANTS[2:]:
            arguments = make_inputs(CROSSING, dtype=torch.bfloat16, masks=True) | options
            first, second = (
                value_and_gradients(partial(mutual_information, backend="triton"), arguments)
                for _ in range(2)
            )
            assert all(torch.equal(first[name], second[name]) for name in first)


class TestEdges:
    def test_nan_reaches_value_and_gradients(self) -> None:
        for options in VARIANTS:
            for where in ("x", "scale"):
                arguments = make_inputs(SHAPES["local and global"]) | options
                with torch.no_grad():
                    arguments[where].view(-1)[0] = math.nan
                found = value_and_gradients(partial(mutual_information, backend="triton"), arguments)
                assert all(value.isnan().any() for value in found.values()), (options, where)

    def test_everything_masked(self) -> None:
        for options in VARIANTS:
            shape = SHAPES["local and global"]
            arguments = make_inputs(shape, dtype=torch.float16, masks=True) | options
            arguments["y_mask"] = torch.zeros_like(arguments["y_mask"])
            found = value_and_gradients(partial(mutual_information, backend="triton"), arguments)
            assert all(not value.any() for value in found.values()), options

    def test_empty(self) -> None:
        for images, locations in ((0, 3), (3, 0)):
            x = torch.randn(images, locations, 4, requires_grad=True)
            value = mutual_information(x, torch.randn(images, 2, 4), backend="triton")
            (gradient,) = torch.autograd.grad(value, x)
            assert not value.any() and gradient.shape == x.shape

    def test_strided_inputs(self) -> None:
        x, y = torch.randn(4, 6, 3).mT[..., ::2], torch.randn(1, 1, 3).expand(4, 5, 3)
        for options in VARIANTS:
            packed = mutual_information(x.contiguous(), y.contiguous(), **options, backend="triton")
            assert torch.equal(mutual_information(x, y, **options, backend="triton"), packed)
