"""Empty, degenerate and extreme inputs of the softmax contrastive losses."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from jrl_kernels import info_nce, info_nce_from_scores
from jrl_kernels.ops.info_nce.cases import SHAPES, Shape, make_inputs
from tests.ops.conformance import BACKENDS, assert_close_to_truth, cast, value_and_gradients


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestEdges:
    def test_one_row(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["one"], device=device)
        found = value_and_gradients(partial(info_nce, backend=backend), arguments)
        assert all(float(v.abs().max()) < 1e-6 for v in found.values())

    @pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0)])
    def test_empty(self, backend: str, device: str, rows: int, columns: int) -> None:
        x = torch.randn(rows, 4, device=device, requires_grad=True)
        y = torch.randn(columns, 4, device=device, requires_grad=True)
        loss, stats = info_nce(x, y, return_stats=True, backend=backend)
        loss.backward()
        assert float(loss) == 0 and float(stats.accuracy_x_to_y) == 0
        assert x.grad is not None and y.grad is not None and not x.grad.any() and not y.grad.any()

    def test_rows_without_positives_contribute_nothing(self, backend: str, device: str) -> None:
        x = torch.randn(3, 4, device=device, requires_grad=True)
        y = torch.randn(3, 4, device=device, requires_grad=True)
        ids = (torch.arange(3, device=device), torch.arange(3, device=device) + 10)
        for multi_positive in ("mean", "sum"):
            loss = info_nce(
                x,
                y,
                positives=ids,
                exclude=torch.zeros(3, dtype=torch.int64, device=device),
                multi_positive=multi_positive,
                backend=backend,
            )
            dx, dy = torch.autograd.grad(loss, (x, y))
            assert float(loss) == 0 and not dx.any() and not dy.any()

    def test_a_row_without_positives_leaves_the_mean(self, backend: str, device: str) -> None:
        x, y = torch.randn(4, 5, device=device), torch.randn(3, 5, device=device)
        ids = (torch.tensor([0, 1, 2, 9], device=device), torch.arange(3, device=device))
        with_it = info_nce(x, y, positives=ids, direction="x_to_y", backend=backend)
        without = info_nce(x[:3], y, direction="x_to_y", backend=backend)
        torch.testing.assert_close(with_it, without)

    def test_nan_reaches_the_output(self, backend: str, device: str) -> None:
        for where in ("x", "y", "scale"):
            arguments = make_inputs(SHAPES["ragged"], device=device, positives="index")
            with torch.no_grad():
                arguments[where].view(-1)[0] = math.nan
            loss = info_nce(**arguments, backend=backend)
            assert loss.isnan()
            gradients = torch.autograd.grad(loss, [arguments["x"], arguments["y"]])
            assert all(g.isnan().any() for g in gradients)

    def test_negatives_that_are_nan(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device, negatives=3)
        arguments["negatives"][1, 1] = math.nan
        assert info_nce(**arguments, backend=backend).isnan()

    def test_extreme_logits(self, backend: str, device: str) -> None:
        """Logits of several thousands: one exp cannot serve both directions."""
        x = torch.randn(70, 16, device=device, requires_grad=True)
        y = torch.randn(70, 16, device=device, requires_grad=True)
        arguments = {"x": x, "y": y, "scale": torch.tensor(100.0, device=device, requires_grad=True)}
        truth = value_and_gradients(partial(info_nce, backend="reference"), cast(arguments, torch.float64))
        plain = value_and_gradients(partial(info_nce, backend="reference"), arguments)
        found = value_and_gradients(partial(info_nce, backend=backend), arguments)
        assert_close_to_truth(found, plain, truth, torch.float32)

    def test_zero_and_negative_scale(self, backend: str, device: str) -> None:
        for scale in (0.0, -7.0):
            arguments = make_inputs(SHAPES["ragged"], device=device, positives="index", scale=scale)
            truth = value_and_gradients(
                partial(info_nce, backend="reference"), cast(arguments, torch.float64)
            )
            found = value_and_gradients(partial(info_nce, backend=backend), arguments)
            assert_close_to_truth(found, found, truth, torch.float32)

    def test_strided_and_expanded_inputs(self, backend: str, device: str) -> None:
        wide = torch.randn(20, 6, device=device)
        x, y = wide.T[:, ::2], torch.randn(1, 10, device=device).expand(6, 10)
        expected = info_nce(x.contiguous(), y.contiguous(), backend=backend)
        # The fused backends pack their operands first; a BLAS may sum strided ones in another order.
        tolerance = 1e-6 if backend == "reference" else 0
        torch.testing.assert_close(info_nce(x, y, backend=backend), expected, rtol=tolerance, atol=0)

    def test_a_converged_batch_keeps_its_gradient(self, backend: str, device: str) -> None:
        """p_ii - 1 is about -1e-4 here: a softmax rounded before the subtraction would lose it."""
        arguments = cast(make_inputs(Shape(64, 64, 64), device=device, scale=30.0), torch.bfloat16)
        with torch.no_grad():
            arguments["x"].copy_(torch.eye(64))
            arguments["y"].copy_(torch.eye(64))
        arguments["scale"] = torch.tensor(13.0, device=device, requires_grad=True)
        truth = value_and_gradients(partial(info_nce, backend="reference"), cast(arguments, torch.float64))
        found = value_and_gradients(partial(info_nce, backend=backend), arguments)
        for name in ("d x", "d y", "d scale"):
            assert (found[name].double() - truth[name]).norm() <= 0.01 * truth[name].norm(), name

    def test_bias_cancels(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device)
        bias = torch.tensor(3.0, device=device, requires_grad=True)
        loss = info_nce(**arguments, bias=bias, backend=backend)
        torch.testing.assert_close(loss, info_nce(**arguments, backend=backend))
        (gradient,) = torch.autograd.grad(loss, bias)
        assert abs(float(gradient)) < 1e-6

    def test_weights_and_reductions(self, backend: str, device: str) -> None:
        arguments = make_inputs(Shape(6, 6, 5), device=device)
        weights = torch.tensor([1.0, 0, 2, 1, 3, 0.5], device=device)
        rows, columns = info_nce(**arguments, reduction="none", backend=backend)
        weighted = info_nce(**arguments, reduction="none", weights=weights, backend=backend)
        torch.testing.assert_close(weighted, (rows * weights, columns * weights))
        mean = info_nce(**arguments, weights=weights, backend=backend)
        torch.testing.assert_close(mean, ((rows + columns) * weights).sum() / weights.sum() / 2)
        total = info_nce(**arguments, weights=weights, reduction="sum", backend=backend)
        torch.testing.assert_close(total, ((rows + columns) * weights).sum() / 2)
        pair = info_nce(**arguments, weights=(weights, 2 * weights), reduction="none", backend=backend)
        torch.testing.assert_close(pair, (rows * weights, 2 * columns * weights))

    def test_one_weight_vector_reaches_columns_through_their_positives(
        self, backend: str, device: str
    ) -> None:
        arguments = make_inputs(Shape(3, 2, 5), device=device)
        arguments["positives"] = torch.tensor([0, 1, 1], device=device)
        weights = torch.tensor([1.0, 2.0, 4.0], device=device)
        plain = info_nce(**arguments, reduction="none", direction="y_to_x", backend=backend)
        found = info_nce(**arguments, reduction="none", direction="y_to_x", weights=weights, backend=backend)
        torch.testing.assert_close(found, plain * torch.tensor([1.0, 3.0], device=device))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiles_with_statistics_and_scores(backend: str, device: str) -> None:
    torch._dynamo.reset()

    def step(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss, stats = info_nce(x, y, scale=5.0, return_stats=True, backend=backend)
        return (
            loss + info_nce_from_scores(x @ y.T, backend=backend),
            stats.accuracy_x_to_y,
            stats.bound_y_to_x,
        )

    x, y = torch.randn(6, 4, device=device), torch.randn(6, 4, device=device)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x, y), step(x, y))


@pytest.mark.gpu
def test_more_logits_than_32_bits_count() -> None:
    """66,000 x 66,000 logits exceed 2^31 and 2^32; the last row's loss is that of its own small problem."""
    x = torch.randn(66_000, 32, device="cuda", dtype=torch.bfloat16)
    losses, _ = info_nce(x, x, scale=0.3, reduction="none", backend="triton")
    last = info_nce(
        x[-5:], x, scale=0.3, positives=torch.arange(65_995, 66_000, device="cuda"), direction="x_to_y",
        reduction="none", backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(losses[-5:], last, rtol=1e-4, atol=1e-4)
