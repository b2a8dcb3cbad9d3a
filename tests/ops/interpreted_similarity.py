"""The Triton kernels of the similarity ops in Triton's interpreter, where a tile is 16 wide; run by test_similarity_triton.py."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from jrl_kernels import _triton_order, agreement_topk, retrieval_ranks, similarity_matrix, similarity_topk
from jrl_kernels.ops.similarity import reference, triton_kernel
from jrl_kernels.ops.similarity.cases import Shape, make_inputs
from tests.ops.conformance import assert_close_to_truth, cast, det, value_and_gradients

pytestmark = [
    pytest.mark.usefixtures("nan_filled_allocations"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "BLOCK", (3, 23))


class TestOrder:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_values_and_gradients(self, dtype: torch.dtype) -> None:
        arguments = make_inputs(Shape(21, 35, 19), dtype=dtype, metric="order", requires_grad=True)
        found, plain, truth = (
            value_and_gradients(partial(similarity_matrix, backend=backend), cast(arguments, precision))
            for backend, precision in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
        )
        assert_close_to_truth(found, plain, truth, dtype)

    @pytest.mark.parametrize("which", ["x", "y"])
    def test_each_gradient_alone(self, which: str) -> None:
        arguments = make_inputs(Shape(18, 7, 5), metric="order")
        arguments[which].requires_grad_()
        found, truth = (
            value_and_gradients(partial(similarity_matrix, backend=backend), cast(arguments, precision))
            for backend, precision in (("triton", torch.float32), ("reference", torch.float64))
        )
        assert_close_to_truth(found, found, truth, torch.float32)

    def test_views_and_addition(self) -> None:
        """Rows of `out` and of `g` that lie apart; gradients are added to what is there."""
        x, y = torch.randn(5, 7), torch.randn(18, 7)
        out = torch.zeros(5, 40)
        _triton_order.scores(x, y, out[:, 3:21])
        torch.testing.assert_close(out[:, 3:21], reference.order(x, y))
        assert not out[:, :3].any() and not out[:, 21:].any()
        g, dx, dy = torch.randn(5, 40)[:, 3:21], torch.ones(5, 7), torch.full((18, 7), 2.0)
        _triton_order.accumulate_gradients(g, x, y, dx, dy)
        v = 2 * g[..., None] * (y - x[:, None]).clamp(min=0)
        torch.testing.assert_close(dx, 1 + v.sum(1))
        torch.testing.assert_close(dy, 2 - v.sum(0))

    def test_nan_and_golden(self) -> None:
        x, y = torch.randn(3, 4), torch.randn(4, 4)
        x[1, 2] = math.nan
        assert similarity_matrix(x, y, metric="order", backend="triton").isnan().all(1).tolist() == [
            False,
            True,
            False,
        ]
        image, text = (F.normalize(det(4, 6, a=a), dim=1).abs().float() for a in (0.37, 0.53))
        found = -similarity_matrix(image, text, metric="order", backend="triton")[:, 0]
        torch.testing.assert_close(
            found, torch.tensor([0.05675525, 0.37253678, 0.17036436, 0.01173237]), rtol=2e-5, atol=0
        )


@pytest.mark.usefixtures("_small_tiles")
class TestSearch:
    @pytest.mark.parametrize(
        ("metric", "dtype", "positives"),
        [
            ("cosine", torch.float32, "sparse"),
            ("cosine", torch.bfloat16, "ids"),
            ("dot", torch.float16, "index"),
            ("order", torch.float32, "ids"),
        ],
    )
    def test_ranks(self, metric: str, dtype: torch.dtype, positives: str) -> None:
        inputs = make_inputs(
            Shape(5, 41, 19), dtype=dtype, metric=metric, positives=positives, duplicates=True
        )
        found, truth = (retrieval_ranks(**inputs, backend=backend) for backend in ("triton", "reference"))
        assert torch.equal(found, truth)

    @pytest.mark.parametrize(
        ("metric", "dtype", "k"),
        [("cosine", torch.float32, 3), ("dot", torch.bfloat16, 1), ("order", torch.float16, 20)],
    )
    def test_topk(self, metric: str, dtype: torch.dtype, k: int) -> None:
        inputs = make_inputs(Shape(4, 41, 19), dtype=dtype, metric=metric, exclude=True, duplicates=True)
        found, truth = (
            similarity_topk(**inputs, k=k, backend=backend) for backend in ("triton", "reference")
        )
        assert torch.equal(found[1], truth[1])
        torch.testing.assert_close(found[0], truth[0], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("metric", ["cosine", "order"])
    def test_nan_infinite_and_zero(self, metric: str) -> None:
        x, y = torch.randn(4, 5), torch.randn(9, 5)
        x[1, 0], x[2], y[3, 4], y[4, 1], y[5] = math.nan, 0.0, math.nan, math.inf, 0.0
        ranks = [retrieval_ranks(x, y, metric=metric, backend=backend) for backend in ("triton", "reference")]
        assert torch.equal(*ranks)
        indices = [
            similarity_topk(x, y, 9, metric=metric, backend=backend)[1] for backend in ("triton", "reference")
        ]
        assert torch.equal(*indices)

    def test_golden_agreement_and_ranks(self) -> None:
        v, a = (F.normalize(det(6, 5, a=a), dim=1).float() for a in (0.37, 0.53))
        for combine, expected in (
            ("min", [[3, 4], [4, 5], [3, 5], [0, 1], [0, 1], [1, 2]]),
            ("max", [[4, 5], [3, 4], [0, 5], [0, 1], [0, 1], [0, 2]]),
        ):
            indices = agreement_topk(v, a, 2, combine=combine, backend="triton")[1]
            assert indices.sort(1).values.tolist() == expected
        values, indices = agreement_topk(v, a, 6, backend="triton")
        assert float(values[0, 0]) == pytest.approx(-0.12269896, rel=2e-5)
        assert values[:, 5].eq(-math.inf).all() and indices[:, 5].eq(-1).all()
        scores = det(5, 5, a=0.37).float()
        assert retrieval_ranks(scores, torch.eye(5), metric="dot", backend="triton").tolist() == [
            4,
            1,
            4,
            1,
            4,
        ]
        assert retrieval_ranks(scores.T, torch.eye(5), metric="dot", backend="triton").tolist() == [
            2,
            2,
            4,
            1,
            2,
        ]
