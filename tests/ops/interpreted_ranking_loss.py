"""The Triton kernels of the ranking loss on CPU tensors, in Triton's interpreter, whose tiles are 16 x 16.

Run by test_ranking_loss_triton.py, in processes that set TRITON_INTERPRET=1 before anything imports triton.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import _triton_launch as triton_launch
from jrl_kernels import ranking_loss, ranking_loss_from_scores
from jrl_kernels._sweep import Source
from jrl_kernels.ops.ranking_loss import triton_kernel
from jrl_kernels.ops.ranking_loss.cases import Shape, make_inputs
from jrl_kernels.ops.ranking_loss.sweep import Options
from tests.ops import test_ranking_loss_edges as edges
from tests.ops import test_ranking_loss_golden as golden
from tests.ops.conformance import value_and_gradients
from tests.ops.test_ranking_loss import DIRECTIONS, judge

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")

SHAPE = Shape(18, 35, 5, 17)
HARDEST = (False, True)


class TestOperators:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("metric", ["cosine", "dot", "order"])
    def test_every_option(self, dtype: torch.dtype, metric: str) -> None:
        margin = 0.02 if metric == "order" else 0.2
        # The metrics share all that the direction and the ids touch.
        directions = DIRECTIONS if metric == "dot" and dtype == torch.float32 else ("both",)
        for direction, hardest, exclude in itertools.product(directions, HARDEST, (False, True)):
            if dtype != torch.float32 and exclude != hardest:
                continue  # ids know nothing of the dtype
            arguments = make_inputs(SHAPE, dtype=dtype, metric=metric, exclude=exclude)
            judge("triton", dtype, arguments, direction=direction, hardest=hardest, margin=margin)

    @pytest.mark.parametrize(
        "shape", [Shape(40, 1, 17), Shape(1, 40, 3), Shape(33, 17, 18), Shape(32, 16, 16, 16)]
    )
    def test_shapes(self, shape: Shape) -> None:
        for hardest, metric in itertools.product(HARDEST, ("dot", "order")):
            arguments = make_inputs(shape, metric=metric, exclude=True)
            judge("triton", torch.float32, arguments, hardest=hardest, margin=1.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_scores(self, dtype: torch.dtype) -> None:
        for hardest, exclude in itertools.product(HARDEST, (False, True)):
            arguments = make_inputs(SHAPE, exclude=exclude)
            scores = (arguments["x"] @ arguments["y"].T).detach().to(dtype).requires_grad_()
            given: dict[str, Any] = {"scores": scores}
            if exclude:
                given["exclude"] = arguments["exclude"][:2]
            judge("triton", dtype, given, hardest=hardest)

    @pytest.mark.parametrize("metric", ["dot", "order"])
    def test_several_blocks(self, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Results carried from one block to the next, and gradients that several blocks add to."""
        monkeypatch.setattr(triton_launch, "PARTIALS_BYTES", 1)
        monkeypatch.setattr(triton_kernel, "BUFFER_BYTES", 16 * 32 * 4)
        for hardest, shape in itertools.product(HARDEST, (Shape(20, 70, 3, 40), Shape(70, 20, 3))):
            arguments = make_inputs(shape, metric=metric, exclude=hardest)
            judge("triton", torch.float32, arguments, hardest=hardest)

    def test_more_tiles_than_one_step_of_the_reduction(self) -> None:
        for hardest in HARDEST:
            judge("triton", torch.float32, make_inputs(Shape(5, 16 * 17 + 3, 2)), hardest=hardest)

    @pytest.mark.parametrize("metric", ["dot", "order"])
    def test_forward_and_backward_see_the_same_violations(self, metric: str) -> None:
        arguments = make_inputs(Shape(50, 40, 7), metric=metric, exclude=True)
        edges.assert_counts_are_those_of_the_tiles("triton", arguments)

    def test_same_bits_twice(self) -> None:
        for hardest in HARDEST:
            call = partial(ranking_loss, hardest=hardest, backend="triton")
            first, second = (value_and_gradients(call, make_inputs(SHAPE)) for _ in range(2))
            for name, value in first.items():
                torch.testing.assert_close(second[name], value, rtol=0, atol=0)

    def test_second_derivative_refuses(self) -> None:
        x = torch.randn(4, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(ranking_loss(x, x, backend="triton"), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="ranking_loss.*backend='reference'"):
            gradient.sum().backward()


class TestGolden(golden.TestGolden):
    @pytest.fixture
    def check(self) -> Any:
        return golden.checker("triton", "cpu", torch.float32)


class TestEdges:
    @pytest.mark.parametrize(
        "name", [name for name in dir(edges.TestEdges) if name.startswith("test_") and name != "test_empty"]
    )
    def test_as_of_every_backend(self, name: str) -> None:
        getattr(edges.TestEdges(), name)("triton", "cpu")

    @pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0)])
    def test_empty(self, rows: int, columns: int) -> None:
        for queue in (None, 0, 4):
            edges.TestEdges().test_empty("triton", "cpu", rows, columns, queue)


class TestHardest:
    """The index and the score that the kernels keep, ties and NaN included, across tiles and blocks."""

    def found(self, scores: torch.Tensor) -> tuple[Any, Any]:
        pairs = min(scores.shape)
        options = Options("dot", True, None, None, True, True, pairs, 0)
        source = Source(None, None, scores, torch.ones(()))
        return triton_kernel.statistics(source, options, torch.zeros(pairs))

    @pytest.mark.parametrize("chunk", [1, 1 << 30])
    def test_ties_and_nan(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_launch, "PARTIALS_BYTES", chunk)
        generator = torch.Generator().manual_seed(0)
        scores = torch.randint(4, (45, 70), generator=generator).float()
        scores[3, 40] = scores[3, 60] = math.nan
        scores[5] = -math.inf
        scores[:, 30] = -math.inf
        rows, columns = self.found(scores)
        hidden = scores.clone()
        hidden.fill_diagonal_(-math.inf)
        for side, dense in ((rows, hidden[:45]), (columns, hidden.T[:45])):
            index = dense.argmax(1)
            expected = dense.gather(1, index[:, None])[:, 0]
            torch.testing.assert_close(side.value, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(side.number, torch.where(expected == -math.inf, -1, index))

    def test_infinity_does_not_hide_nan(self) -> None:
        scores = torch.zeros(20, 40)
        scores[1, 3], scores[1, 30] = math.inf, math.nan
        rows, _ = self.found(scores)
        assert rows.value[1].isnan()
        assert 0 <= int(rows.number[1]) < 40


class TestScoresAlone:
    def test_a_view_of_scores(self) -> None:
        whole = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
        view = whole.T[3:33, ::2]
        for hardest in HARDEST:
            call = partial(ranking_loss_from_scores, hardest=hardest)
            torch.testing.assert_close(call(view, backend="triton"), call(view, backend="reference"))
