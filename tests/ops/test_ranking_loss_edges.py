"""Empty, degenerate and extreme inputs of the ranking loss."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import ranking_loss, ranking_loss_from_scores
from jrl_kernels._sweep import Source
from jrl_kernels.ops.ranking_loss.backends import BACKENDS as IMPLEMENTATIONS
from jrl_kernels.ops.ranking_loss.cases import SHAPES, Shape, bytes_moved, flops, make_inputs
from jrl_kernels.ops.ranking_loss.sweep import Options
from tests.ops.conformance import BACKENDS, FUSED, assert_close_to_truth, cast, value_and_gradients

HARDEST = (False, True)
# Small, since the interpreter runs these tests too, yet more than one of its tiles.
WIDE = Shape(9, 18, 5, 4)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestEdges:
    def test_one_row(self, backend: str, device: str) -> None:
        for hardest, metric in itertools.product(HARDEST, ("cosine", "dot", "order")):
            arguments = make_inputs(SHAPES["one"], device=device, metric=metric)
            found = value_and_gradients(partial(ranking_loss, hardest=hardest, backend=backend), arguments)
            assert all(not value.any() for value in found.values())

    @pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0)])
    @pytest.mark.parametrize("queue", [None, 0, 4])
    def test_empty(self, backend: str, device: str, rows: int, columns: int, queue: int | None) -> None:
        for hardest, metric in itertools.product(HARDEST, ("cosine", "dot", "order")):
            x = torch.randn(rows, 4, device=device, requires_grad=True)
            y = torch.randn(columns, 4, device=device, requires_grad=True)
            negatives = None if queue is None else torch.randn(queue, 4, device=device)
            call = partial(
                ranking_loss, x, y, negatives=negatives, hardest=hardest, metric=metric, backend=backend
            )
            by_row, by_column = call(reduction="none")
            assert by_row.shape == (rows,) and by_column.shape == (columns,)
            for reduction in ("sum", "mean"):
                loss = call(reduction=reduction)
                dx, dy = torch.autograd.grad(loss, (x, y))
                assert float(loss) == 0 and not dx.any() and not dy.any()
        scores = torch.randn(rows, columns, device=device, requires_grad=True)
        loss = ranking_loss_from_scores(scores, backend=backend)
        (gradient,) = torch.autograd.grad(loss, scores)
        assert float(loss) == 0 and gradient.shape == (rows, columns)

    def test_an_empty_queue_and_no_width(self, backend: str, device: str) -> None:
        for hardest in HARDEST:
            arguments = make_inputs(SHAPES["tiny"], device=device)
            plain = value_and_gradients(partial(ranking_loss, hardest=hardest, backend=backend), arguments)
            arguments["negatives"] = torch.empty(0, 5, device=device)
            found = value_and_gradients(partial(ranking_loss, hardest=hardest, backend=backend), arguments)
            torch.testing.assert_close(found, plain, rtol=0, atol=0)
            nothing = torch.empty(3, 0, device=device)
            loss = ranking_loss(nothing, nothing, metric="dot", hardest=hardest, backend=backend)
            assert float(loss) == pytest.approx((6 if hardest else 12) * 0.2)

    def test_everything_excluded_contributes_nothing(self, backend: str, device: str) -> None:
        """Not even where the scores are infinite, which a mask by multiplication would turn into NaN."""
        same = torch.zeros(5, dtype=torch.int64, device=device)
        for hardest in HARDEST:
            scores = torch.full((5, 5), math.inf, device=device, requires_grad=True)
            loss = ranking_loss_from_scores(scores, exclude=same, hardest=hardest, backend=backend)
            (gradient,) = torch.autograd.grad(loss, scores)
            assert float(loss) == 0 and not gradient.any()
            for metric in ("dot", "order"):
                arguments = make_inputs(SHAPES["tiny"], device=device, metric=metric)
                arguments["exclude"] = torch.zeros(6, dtype=torch.int64, device=device)
                found = value_and_gradients(
                    partial(ranking_loss, hardest=hardest, margin=9.0, backend=backend), arguments
                )
                assert all(not value.any() for value in found.values())

    def test_an_excluded_row_contributes_nothing(self, backend: str, device: str) -> None:
        """Row 5 may not see the others' captions nor they its own: the rest is as if it were not there."""
        arguments = make_inputs(Shape(6, 6, 5), device=device, metric="dot")
        exclude = (torch.tensor([7] * 5 + [8], device=device), torch.tensor([8] * 5 + [7], device=device))
        for hardest, direction in itertools.product(HARDEST, ("both", "x_to_y", "y_to_x")):
            call = partial(ranking_loss, direction=direction, hardest=hardest, margin=2.0, backend=backend)
            found = value_and_gradients(partial(call, exclude=exclude), arguments)
            rest = {k: v.detach()[:5].requires_grad_() for k, v in arguments.items() if k != "metric"}
            expected = value_and_gradients(partial(call, metric="dot"), rest)
            torch.testing.assert_close(found["output 0"], expected["output 0"])
            for name in ("d x", "d y"):
                torch.testing.assert_close(found[name][:5], expected[name])
                assert not found[name][5].any()

    def test_rows_beyond_the_diagonal_are_only_candidates(self, backend: str, device: str) -> None:
        for hardest in HARDEST:
            for shape in (Shape(9, 4, 5), Shape(4, 9, 5)):
                arguments = make_inputs(shape, device=device, metric="dot")
                call = partial(ranking_loss, hardest=hardest, margin=3.0, reduction="none", backend=backend)
                by_row, by_column = call(**arguments)
                assert by_row.shape == (shape.rows,) and by_column.shape == (shape.columns,)
                assert not by_row[4:].any() and not by_column[4:].any()
                x, y = arguments["x"][:4], arguments["y"][:4]
                square = call(x, y, metric="dot")
                longer, shorter = (by_row, by_column) if shape.columns > 4 else (by_column, by_row)
                aligned = square if shape.columns > 4 else square[::-1]
                assert bool((longer[:4] >= aligned[0]).all()) and float(longer.sum()) > float(
                    aligned[0].sum()
                )
                torch.testing.assert_close(shorter[:4], aligned[1])

    def test_no_gradient_where_a_violation_is_exactly_zero(self, backend: str, device: str) -> None:
        """Whole numbers, whose dot products are exact: every margin is met to the bit."""
        for hardest, metric in itertools.product(HARDEST, ("dot", "order")):
            x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], device=device, requires_grad=True)
            y = torch.tensor([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0]], device=device, requires_grad=True)
            loss = ranking_loss(x, y, margin=0.0, metric=metric, hardest=hardest, backend=backend)
            dx, dy = torch.autograd.grad(loss, (x, y))
            assert float(loss) == 0 and not dx.any() and not dy.any()

    def test_ties_go_to_the_lowest_index(self, backend: str, device: str) -> None:
        scores = torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]], device=device, requires_grad=True)
        loss = ranking_loss_from_scores(scores, hardest=True, direction="x_to_y", backend=backend)
        (gradient,) = torch.autograd.grad(loss, scores)
        expected = torch.tensor([[-1.0, 1, 0, 0], [1, -1, 0, 0], [1, 0, -1, 0]], device=device)
        assert torch.equal(gradient, expected)
        loss = ranking_loss_from_scores(scores, hardest=True, direction="y_to_x", backend=backend)
        (gradient,) = torch.autograd.grad(loss, scores)
        expected = torch.tensor([[-1.0, 1, 1, 0], [1, -1, 0, 0], [0, 0, -1, 0]], device=device)
        assert torch.equal(gradient, expected)
        # Equal keys in the batch and in the queue: the batch comes first.
        x = torch.eye(3, device=device)
        y = torch.ones(3, 3, device=device, requires_grad=True)
        loss = ranking_loss(
            x, y, metric="dot", negatives=torch.ones(2, 3, device=device), hardest=True, direction="x_to_y",
            backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, y)
        expected = torch.tensor([[-1.0, 1, 1], [1, -1, 0], [0, 0, -1]], device=device)
        assert torch.equal(gradient, expected)

    def test_one_hub_is_everybodys_hardest(self, backend: str, device: str) -> None:
        """The rows that share a hardest candidate all reach its gradient."""
        x = torch.randn(40, 3, device=device).abs()
        y = torch.zeros(40, 3, device=device)
        y[7] = 5.0
        y.requires_grad_()
        loss = ranking_loss(x, y, metric="dot", hardest=True, direction="x_to_y", backend=backend)
        (gradient,) = torch.autograd.grad(loss, y)
        active = torch.arange(40, device=device) != 7
        torch.testing.assert_close(gradient[7], x[active].sum(0))
        torch.testing.assert_close(gradient[active], -x[active])

    def test_nan_reaches_the_loss(self, backend: str, device: str) -> None:
        for hardest, metric in itertools.product(HARDEST, ("dot", "order")):
            for where in ("x", "y", "negatives"):
                arguments = make_inputs(WIDE, device=device, metric=metric)
                with torch.no_grad():
                    arguments[where][3, 1] = math.nan
                call = partial(ranking_loss, **arguments, hardest=hardest, backend=backend)
                by_row, by_column = call(reduction="none")
                assert (by_row.sum() + by_column.sum()).isnan(), (hardest, metric, where)
                if where == "x":
                    assert by_row.isnan().nonzero().tolist() == [[3]]
                    assert by_column[:9].isnan().all()
                elif where == "y":
                    assert by_row.isnan().all()
                    assert by_column.isnan().nonzero().tolist() == [[3]]
                else:
                    assert by_row.isnan().all()
                    assert not by_column.isnan().any()

    def test_nan_in_scores_reaches_the_gradient(self, backend: str, device: str) -> None:
        for hardest in HARDEST:
            arguments = make_inputs(SHAPES["tiny"], device=device, metric="dot")
            with torch.no_grad():
                arguments["x"][3, 1] = math.nan
            loss = ranking_loss(**arguments, margin=1.0, hardest=hardest, backend=backend)
            assert torch.autograd.grad(loss, arguments["y"])[0].isnan().any()

    def test_masked_scores(self, backend: str, device: str) -> None:
        """A critic's -inf is no violation."""
        arguments = make_inputs(Shape(24, 20, 5), device=device, metric="dot")
        scores = (arguments["x"] @ arguments["y"].T).detach()
        hidden = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
        hidden.fill_diagonal_(False)
        hidden[5] = True
        hidden[5, 5] = False
        low = torch.where(hidden, -1e6, scores)
        for hardest in HARDEST:
            call = partial(ranking_loss_from_scores, hardest=hardest, backend=backend)
            given = torch.where(hidden, -math.inf, scores)
            found = value_and_gradients(call, {"scores": given.requires_grad_()})
            expected = value_and_gradients(call, {"scores": low.clone().requires_grad_()})
            torch.testing.assert_close(found, expected)

    def test_extreme_scores(self, backend: str, device: str) -> None:
        for hardest, metric in itertools.product(HARDEST, ("dot", "order")):
            x = torch.randn(40, 5, device=device)
            y = torch.randn(40, 5, device=device)
            arguments = {"x": (100 * x).requires_grad_(), "y": y.requires_grad_()}
            call = partial(ranking_loss, metric=metric, hardest=hardest)
            truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
            plain = value_and_gradients(partial(call, backend="reference"), arguments)
            found = value_and_gradients(partial(call, backend=backend), arguments)
            assert_close_to_truth(found, plain, truth, torch.float32)

    def test_strided_and_expanded_inputs(self, backend: str, device: str) -> None:
        wide = torch.randn(20, 6, device=device)
        x, y = wide.T[:, ::2], torch.randn(1, 10, device=device).expand(6, 10)
        queue = torch.randn(10, 8, device=device).T
        for hardest, metric in itertools.product(HARDEST, ("cosine", "dot", "order")):
            call = partial(ranking_loss, metric=metric, hardest=hardest, backend=backend, margin=1.0)
            expected = call(x.contiguous(), y.contiguous(), negatives=queue.contiguous())
            # A BLAS and a norm may sum strided rows in another order.
            torch.testing.assert_close(call(x, y, negatives=queue), expected, rtol=2e-6, atol=0)
        scores = torch.randn(12, 14, device=device).T[::2]
        expected = ranking_loss_from_scores(scores.contiguous(), backend=backend)
        torch.testing.assert_close(ranking_loss_from_scores(scores, backend=backend), expected)

    def test_reductions(self, backend: str, device: str) -> None:
        arguments = make_inputs(WIDE, device=device)
        for hardest in HARDEST:
            call = partial(ranking_loss, **arguments, hardest=hardest, backend=backend)
            by_row, by_column = call(reduction="none")
            torch.testing.assert_close(call(), by_row.sum() + by_column.sum())
            torch.testing.assert_close(call(reduction="mean"), (by_row.sum() + by_column.sum()) / 9)
            torch.testing.assert_close(call(reduction="mean", direction="x_to_y"), by_row.mean())
            torch.testing.assert_close(call(direction="y_to_x"), by_column.sum())
            torch.testing.assert_close(call(reduction="none", direction="y_to_x"), by_column)

    def test_uneven_upstream_gradients(self, backend: str, device: str) -> None:
        """Rows of very different weight, some of none: what half precision must still resolve."""
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for hardest in HARDEST:
                arguments = make_inputs(Shape(40, 40, 7), dtype=dtype, device=device, metric="dot")
                weights = torch.logspace(-4, 0, 40, device=device)
                weights[::5] = 0.0
                call = partial(ranking_loss, hardest=hardest, reduction="none")
                found, plain, truth = (
                    value_and_gradients(
                        partial(call, backend=name), cast(arguments, precision), [weights, weights.flip(0)]
                    )
                    for name, precision in (
                        (backend, dtype),
                        ("reference", dtype),
                        ("reference", torch.float64),
                    )
                )
                assert_close_to_truth(found, plain, truth, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("hardest", HARDEST)
def test_more_scores_than_32_bits_count(hardest: bool) -> None:
    """66,000 x 66,000 scores exceed 2^31 and 2^32; the last rows' losses are those of dense scores."""
    x = torch.randn(66_000, 32, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(66_000, 32, device="cuda", dtype=torch.bfloat16)
    losses = ranking_loss(
        x, y, metric="dot", hardest=hardest, direction="x_to_y", reduction="none", backend="triton"
    )
    assert isinstance(losses, torch.Tensor)
    dense = x[-5:].double() @ y.double().T
    positive = dense[:, -5:].diagonal()
    violations = (0.2 - positive[:, None] + dense).clamp(min=0)
    violations[:, -5:].fill_diagonal_(0.0)
    expected = violations.amax(1) if hardest else violations.sum(1)
    torch.testing.assert_close(losses[-5:].double(), expected, rtol=1e-4, atol=1e-4)


def assert_counts_are_those_of_the_tiles(backend: str, arguments: dict[str, Any]) -> None:
    """The violations that the forward counted are those that the backward's tiles find."""
    implementation: Any = IMPLEMENTATIONS[backend].load()
    x, y = (implementation.prepare(arguments[name].detach()) for name in ("x", "y"))
    source = Source(x, y, None, torch.ones((), device=x.device))
    pairs = min(source.shape)
    x_ids, y_ids = arguments["exclude"]
    options = Options(arguments["metric"], False, x_ids, y_ids, True, True, pairs, 0)
    base = 0.05 - implementation.positive_scores(source, options)
    ones = torch.ones(pairs, device=x.device)
    rows, columns = implementation.statistics(source, options, base)
    for side, axis, grads in ((rows, 1, (ones, None)), (columns, 0, (None, ones))):
        tile, block = implementation.gradient(source, options, base, *grads)
        found = torch.zeros(source.shape[1 - axis], dtype=torch.int64, device=x.device)
        for r0 in range(0, source.shape[0], block[0]):
            for c0 in range(0, source.shape[1], block[1]):
                r1, c1 = min(r0 + block[0], source.shape[0]), min(c0 + block[1], source.shape[1])
                part = slice(r0, r1) if axis == 1 else slice(c0, c1)
                found[part] += (tile(r0, r1, c0, c1) != 0).sum(axis)
        assert side.number.any()
        assert torch.equal(side.number, found[:pairs])


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("metric", ["dot", "order"])
def test_forward_and_backward_see_the_same_violations(backend: str, device: str, metric: str) -> None:
    arguments = make_inputs(Shape(1100, 1030, 7), device=device, metric=metric, exclude=True)
    assert_counts_are_those_of_the_tiles(backend, arguments)


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("hardest", HARDEST)
def test_nothing_of_the_scores_size_is_saved(backend: str, device: str, hardest: bool) -> None:
    arguments = make_inputs(Shape(300, 400, 8, 200), device=device, metric="dot", exclude=True)
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ranking_loss(**arguments, hardest=hardest, backend=backend)
    assert saved and max(saved) <= 400 * 8


def test_costs_count_every_product() -> None:
    shape = Shape(10, 20, 4, 5)
    assert flops(shape, backward=False) == 2 * 4 * (10 * 20 + 10 * 5)
    assert flops(shape, backward=True) == 2 * 4 * (4 * 10 * 20 + 3 * 10 * 5)
    assert bytes_moved(shape, torch.bfloat16, backward=False) == 2 * 4 * (10 + 20 + 5)
    assert bytes_moved(shape, torch.bfloat16, backward=True) == 2 * 4 * (3 * (10 + 20) + 2 * 5)
