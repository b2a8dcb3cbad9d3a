"""The public contrastive losses and the sigmoid kernels on CPU tensors, in Triton's interpreter.

Run by test_info_nce_triton.py, as interpreted_info_nce.py is.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import _triton_launch as triton_launch
from jrl_kernels._positives import Positives
from jrl_kernels.ops.info_nce import (
    info_nce,
    info_nce_from_scores,
    sigmoid_contrastive,
    triton_kernel,
)
from jrl_kernels.ops.info_nce.cases import POSITIVES, Shape, make_inputs
from jrl_kernels.ops.info_nce.reference import positive_mask
from tests.ops.conformance import assert_close_to_truth, cast, value_and_gradients
from tests.ops.interpreted_inputs import (
    HALVES_AND_FLOAT,
    SHAPE,
    logits_of,
    pairs_of,
    source_of,
)

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")


class TestOperators:
    """Through the public functions: what surrounds the kernels knows nothing of the backend, but must agree with it."""

    @pytest.mark.parametrize(
        ("positives", "dtype"),
        [
            *((positives, torch.float32) for positives in POSITIVES),
            *(
                (positives, dtype)
                for positives in ("diagonal", "ids")
                for dtype in (torch.bfloat16, torch.float16)
            ),
        ],
    )
    def test_info_nce(self, positives: str, dtype: torch.dtype) -> None:
        for exclude, negatives, multi_positive, direction in (
            (False, 0, "mean", "both"),
            (True, 9, "sum", "both"),
            (True, 0, "mean", "y_to_x"),
            (False, 9, "sum", "x_to_y"),
        ):
            arguments = make_inputs(
                SHAPE,
                dtype=dtype,
                positives=positives,
                exclude=exclude,
                negatives=negatives,
                weights=True,
                scale=5.0,
            )
            arguments |= {"direction": direction, "multi_positive": multi_positive}
            if direction == "y_to_x":
                arguments["reduction"] = "sum"
            found, plain, truth = (
                value_and_gradients(partial(info_nce, backend=backend), cast(arguments, precision))
                for backend, precision in (
                    ("triton", dtype),
                    ("reference", dtype),
                    ("reference", torch.float64),
                )
            )
            assert_close_to_truth(found, plain, truth, dtype)

    @pytest.mark.parametrize("positives", ["diagonal", "ids"])
    def test_scores(self, positives: str) -> None:
        arguments = make_inputs(SHAPE, positives=positives, exclude=True)
        scores = (arguments.pop("x") @ arguments.pop("y").T).detach().requires_grad_()
        arguments["scores"] = scores
        found, truth = (
            value_and_gradients(partial(info_nce_from_scores, backend=backend), cast(arguments, precision))
            for backend, precision in (("triton", torch.float32), ("reference", torch.float64))
        )
        assert_close_to_truth(found, found, truth, torch.float32)

    @pytest.mark.parametrize("positives", POSITIVES)
    def test_statistics(self, positives: str) -> None:
        arguments = make_inputs(SHAPE, positives=positives, exclude=True, negatives=5, scale=4.0)
        _, found = info_nce(**arguments, return_stats=True, backend="triton")
        _, truth = info_nce(**cast(arguments, torch.float64), return_stats=True, backend="reference")
        for name, value in truth._asdict().items():
            assert float(getattr(found, name)) == pytest.approx(float(value), abs=3e-5), name

    @pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
    def test_gradient_in_many_tiles(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_kernel, "GRADIENT_BYTES", 16 * 32 * dtype.itemsize)
        monkeypatch.setattr(triton_launch, "PARTIALS_BYTES", 1)
        arguments = make_inputs(Shape(37, 53, 19), dtype=dtype)
        found, plain, truth = (
            value_and_gradients(partial(info_nce, backend=backend), cast(arguments, precision))
            for backend, precision in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
        )
        assert_close_to_truth(found, plain, truth, dtype)

    @pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
    def test_extreme_scale(self, dtype: torch.dtype) -> None:
        arguments = make_inputs(Shape(20, 20, 8), dtype=dtype, scale=100.0)
        found, plain, truth = (
            value_and_gradients(partial(info_nce, backend=backend), cast(arguments, precision))
            for backend, precision in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
        )
        assert_close_to_truth(found, plain, truth, dtype)

    def test_nan_reaches_loss_and_gradients(self) -> None:
        arguments = make_inputs(SHAPE)
        with torch.no_grad():
            arguments["x"][2, 3] = math.nan
        found = value_and_gradients(partial(info_nce, backend="triton"), arguments)
        assert all(value.isnan().any() for value in found.values())

    def test_everything_excluded(self) -> None:
        x, y = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
        different = (torch.arange(5), torch.arange(5) + 10)
        same = torch.zeros(5, dtype=torch.int64)
        loss = info_nce(x, y, positives=different, exclude=same, backend="triton")
        loss.backward()
        assert float(loss) == 0
        assert x.grad is not None
        assert not x.grad.any()

    def test_strided_inputs(self) -> None:
        x, y = torch.randn(19, 2 * 21).T[::2], torch.randn(30, 19, 2)[..., 0]
        assert not x.is_contiguous()
        found = info_nce(x, y, positives=torch.arange(21), backend="triton")
        expected = info_nce(x.double(), y.double(), positives=torch.arange(21), backend="reference")
        assert float(found) == pytest.approx(float(expected), rel=1e-5)

    def test_same_bits_twice(self) -> None:
        arguments = make_inputs(SHAPE, dtype=torch.bfloat16, positives="ids")
        first, second = (
            value_and_gradients(partial(info_nce, backend="triton"), arguments) for _ in range(2)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestSigmoid:
    @pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
    @pytest.mark.parametrize("kind", ["listed", "ids"])
    @pytest.mark.parametrize("bias", [None, -2.0])
    def test_sums_and_tiles(self, dtype: torch.dtype, kind: str, bias: float | None) -> None:
        source = source_of(SHAPE, dtype, scale=0.9, bias=bias)
        pairs = pairs_of(kind, SHAPE)
        s = logits_of(source)
        positive = positive_mask(pairs, *s.shape)
        sums, pair_logits = triton_kernel.sigmoid_sums(source, pairs)
        direct = torch.nn.functional.softplus(s).sum(1) - torch.where(positive & (kind == "ids"), s, 0.0).sum(
            1
        )
        torch.testing.assert_close(sums.double(), direct, rtol=1e-5, atol=1e-6)
        if kind == "listed":
            assert pair_logits is not None
            torch.testing.assert_close(
                pair_logits.double(), s[pairs.rows, pairs.columns], rtol=1e-5, atol=1e-5
            )
        upstream = torch.linspace(0.1, 1.0, SHAPE.rows)
        tile, _ = triton_kernel.sigmoid_gradient(source, pairs, upstream, pair_logits)
        expected = upstream.double()[:, None] * (torch.sigmoid(s) - positive.double())
        unit = getattr(tile, "unit", None)
        for r0, r1, c0, c1 in ((0, 21, 0, 30), (3, 20, 13, 29)):
            found = tile(r0, r1, c0, c1).double() * (1.0 if unit is None else unit.double())
            tolerance = 1e-5 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(found, expected[r0:r1, c0:c1], rtol=tolerance, atol=1e-6)

    @pytest.mark.parametrize("shift", [-60.0, -30.0, -18.0, -9.0, -3.0, 0.0, 40.0])
    def test_softplus_keeps_its_digits(self, shift: float) -> None:
        source = source_of(SHAPE, scale=0.2, bias=shift)
        sums, _ = triton_kernel.sigmoid_sums(source, Positives())
        exact = torch.nn.functional.softplus(logits_of(source), threshold=1000).sum(1)
        torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=0)

    def test_infinite_and_nan(self) -> None:
        source = source_of(SHAPE, scores=True)
        assert source.scores is not None
        source.scores[0] = -math.inf
        source.scores[1, 2] = math.nan
        sums, _ = triton_kernel.sigmoid_sums(source, Positives())
        assert float(sums[0]) == 0
        assert sums.isnan().nonzero().flatten().tolist() == [1]

    @pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0)])
    def test_empty(self, rows: int, columns: int) -> None:
        sums, _ = triton_kernel.sigmoid_sums(source_of(Shape(rows, columns, 4)), Positives())
        assert torch.equal(sums, torch.zeros(rows))

    def test_partials_in_several_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_launch, "PARTIALS_BYTES", 1)
        source = source_of(Shape(21, 70, 5))
        sums, _ = triton_kernel.sigmoid_sums(source, Positives())
        exact = torch.nn.functional.softplus(logits_of(source)).sum(1)
        torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
    @pytest.mark.parametrize("positives", ["diagonal", "ids", "sparse"])
    def test_operator(self, dtype: torch.dtype, positives: str) -> None:
        inputs: dict[str, Any] = make_inputs(SHAPE, dtype=dtype, positives=positives)
        inputs["bias"] = torch.tensor(-4.0, requires_grad=True)
        found, plain, truth = (
            value_and_gradients(partial(sigmoid_contrastive, backend=backend), cast(inputs, precision))
            for backend, precision in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
        )
        assert_close_to_truth(found, plain, truth, dtype)
