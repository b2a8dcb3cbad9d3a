"""Values and gradients of the contrastive losses: golden values, float64 truth, edges, properties."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jrl_kernels import info_nce, info_nce_from_scores
from jrl_kernels.ops.info_nce.cases import POSITIVES, SHAPES, Shape, make_inputs
from tests.ops.conformance import BACKENDS, FUSED, assert_close_to_truth, cast, det, value_and_gradients

F32 = pytest.param(torch.float32, 2e-5, id="float32")
F64 = pytest.param(torch.float64, 1e-9, id="float64")


def unit(*shape: int, a: float) -> torch.Tensor:
    return F.normalize(det(*shape, a=a), dim=-1)


class TestGolden:
    """Numbers of the original codes and of the documents' formulas."""

    @pytest.fixture(params=[pytest.param(p.values, id=p.id, marks=p.marks) for p in BACKENDS])
    def run(self, request: pytest.FixtureRequest) -> Any:
        backend, device = request.param

        def call(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype, **options: Any) -> float:
            if dtype == torch.float64 and backend == "triton":
                pytest.skip("triton takes no float64; float32 covers it")

            def move(value: Any) -> Any:
                if isinstance(value, tuple):
                    return tuple(move(v) for v in value)
                if isinstance(value, torch.Tensor):
                    return value.to(device, dtype if value.is_floating_point() else None)
                return value

            options = {name: move(value) for name, value in options.items()}
            return float(info_nce(move(x), move(y), backend=backend, **options))

        return call

    @pytest.mark.parametrize(("dtype", "tolerance"), [F64, F32])
    def test_clip(self, run: Any, dtype: torch.dtype, tolerance: float) -> None:
        loss = run(det(4, 6, a=0.37), det(4, 6, a=0.53), dtype, scale=1 / 0.07, normalize=True)
        assert loss == pytest.approx(14.5379491598, rel=tolerance)

    @pytest.mark.parametrize(("dtype", "tolerance"), [F64, F32])
    @pytest.mark.parametrize(
        ("multi_positive", "direction", "golden"),
        [
            ("mean", "x_to_y", 11.4005142996),
            ("mean", "y_to_x", 9.8665282039),
            ("mean", "both", 10.6335212517),
            ("sum", "x_to_y", 2.2739793301),
            ("sum", "y_to_x", 9.8665282039),
            ("sum", "both", 12.1405075340 / 2),
        ],
    )
    @pytest.mark.parametrize("form", ["ids", "sparse"])
    def test_group_vit_prompts(
        self,
        run: Any,
        form: str,
        multi_positive: str,
        direction: str,
        golden: float,
        dtype: torch.dtype,
        tolerance: float,
    ) -> None:
        """Three prompts an image, "mean" as the code has it and "sum" as the patent's equation 7 (which adds directions)."""
        owner = torch.arange(4).repeat_interleave(3)
        positives: Any = (torch.arange(4), owner)
        if form == "sparse":
            positives = (torch.arange(4)[:, None] == owner[None]).to_sparse_csr()
        texts = unit(4, 3, 6, a=0.71).reshape(12, 6)
        loss = run(
            unit(4, 6, a=0.37),
            texts,
            dtype,
            scale=1 / 0.07,
            positives=positives,
            multi_positive=multi_positive,
            direction=direction,
        )
        assert loss == pytest.approx(golden, rel=tolerance)

    @pytest.mark.parametrize(("dtype", "tolerance"), [F64, F32])
    def test_queue(self, run: Any, dtype: torch.dtype, tolerance: float) -> None:
        """J_ii of multimodal contrastive training: the positive against a queue, no negatives from the batch."""
        loss = run(
            unit(4, 6, a=0.37),
            unit(4, 6, a=0.53),
            dtype,
            scale=1 / 0.07,
            negatives=unit(7, 6, a=0.71),
            exclude=torch.zeros(4, dtype=torch.int64),
            direction="x_to_y",
        )
        assert loss == pytest.approx(12.8673491350, rel=tolerance)

    @pytest.mark.parametrize(("dtype", "tolerance"), [F64, F32])
    def test_tags(self, run: Any, dtype: torch.dtype, tolerance: float) -> None:
        """J_tag of multimodal contrastive training: several positives in a queue of nine."""
        mask = torch.zeros(4, 9, dtype=torch.bool)
        mask[[0, 0, 1, 2, 2, 2, 3], [0, 3, 1, 2, 4, 5, 8]] = True
        loss = run(
            unit(4, 6, a=0.37),
            unit(9, 6, a=0.71),
            dtype,
            scale=1 / 0.07,
            positives=mask.to_sparse_csr(),
            direction="x_to_y",
        )
        assert loss == pytest.approx(13.6240630408, rel=tolerance)

    @pytest.mark.parametrize("backend", ["reference", "cpu"])
    def test_xmc_gan_contrastive(self, backend: str) -> None:
        """The code's loss adds the two directions, and reports accuracy over both."""
        loss, stats = info_nce(
            det(4, 6, a=0.37),
            det(4, 6, a=0.53),
            scale=10.0,
            normalize=True,
            return_stats=True,
            backend=backend,
        )
        assert 2 * float(loss) == pytest.approx(20.6409361870, rel=1e-9)
        assert (float(stats.accuracy_x_to_y) + float(stats.accuracy_y_to_x)) / 2 == 0.25


def judge(backend: str, dtype: torch.dtype, arguments: dict[str, Any], **options: Any) -> None:
    """`arguments` are in `dtype`; the truth is the reference on the same numbers in float64."""
    call = partial(info_nce, reduction="none", **options)
    fused = value_and_gradients(partial(call, backend=backend), arguments)
    plain = value_and_gradients(partial(call, backend="reference"), arguments)
    truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
    assert_close_to_truth(fused, plain, truth, dtype)


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positives", POSITIVES)
def test_every_option_against_float64(
    backend: str, device: str, dtype: torch.dtype, shape: str, positives: str
) -> None:
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("triton takes no float64")
    for direction, multi_positive, exclude, negatives in itertools.product(
        ("both", "x_to_y", "y_to_x"), ("mean", "sum"), (False, True), (0, 11)
    ):
        arguments = make_inputs(
            SHAPES[shape],
            dtype=dtype,
            device=device,
            positives=positives,
            negatives=negatives,
            exclude=exclude,
            weights=exclude,
            scale=100.0 if exclude else 10.0,
        )
        judge(backend, dtype, arguments, direction=direction, multi_positive=multi_positive)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_many_tiles(backend: str, device: str, nan_filled_allocations: None) -> None:
    """More than one tile each way, none of them whole; in memory that starts as NaN."""
    for positives, exclude in itertools.product(POSITIVES, (False, True)):
        shape = Shape(1100, 1303, 24)
        extra = 1030 if exclude else 0
        arguments = make_inputs(
            shape, device=device, positives=positives, negatives=extra, exclude=exclude, scale=30.0
        )
        judge(backend, torch.float32, arguments)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("positives", POSITIVES)
def test_gradcheck(backend: str, positives: str) -> None:
    arguments = make_inputs(
        Shape(5, 7, 3), dtype=torch.float64, positives=positives, negatives=4, exclude=True, scale=3.0
    )
    names = ("x", "y", "scale")
    for multi_positive in ("mean", "sum"):

        def loss(*values: torch.Tensor, how: str = multi_positive) -> torch.Tensor:
            return info_nce(
                **{**arguments, **dict(zip(names, values, strict=True))}, multi_positive=how, backend=backend
            )

        assert torch.autograd.gradcheck(loss, tuple(arguments[name] for name in names))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_each_gradient_alone(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["ragged"], device=device, negatives=9)
    everything = value_and_gradients(partial(info_nce, backend=backend), arguments)
    for name in ("x", "y", "scale"):
        alone = {k: v.detach() if k in ("x", "y", "scale") and k != name else v for k, v in arguments.items()}
        found = value_and_gradients(partial(info_nce, backend=backend), alone)
        torch.testing.assert_close(found[f"d {name}"], everything[f"d {name}"], rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_scores_give_the_same_loss(backend: str, device: str) -> None:
    for positives, exclude in itertools.product(POSITIVES, (False, True)):
        arguments = make_inputs(
            SHAPES["ragged"], device=device, positives=positives, exclude=exclude, weights=True
        )
        scores = (arguments["x"] @ arguments["y"].T).detach().requires_grad_()
        rest = {k: v for k, v in arguments.items() if k not in ("x", "y")}
        found = value_and_gradients(
            partial(info_nce_from_scores, backend=backend), {"scores": scores, **rest}
        )
        truth = value_and_gradients(
            partial(info_nce_from_scores, backend="reference"),
            cast({"scores": scores, **rest}, torch.float64),
        )
        assert_close_to_truth(found, found, truth, torch.float32)
        direct = info_nce(**arguments, backend=backend)
        torch.testing.assert_close(found["output 0"], direct.detach(), rtol=2e-5, atol=2e-5)


class TestStatistics:
    @pytest.mark.parametrize(("backend", "device"), FUSED)
    @pytest.mark.parametrize("positives", POSITIVES)
    def test_against_reference(self, backend: str, device: str, positives: str) -> None:
        for exclude, negatives in itertools.product((False, True), (0, 13)):
            for shape in (SHAPES["ragged"], Shape(1100, 1050, 8)):
                arguments = make_inputs(
                    shape, device=device, positives=positives, exclude=exclude, negatives=negatives, scale=5.0
                )
                loss, found = info_nce(**arguments, return_stats=True, backend=backend)
                _, truth = info_nce(**cast(arguments, torch.float64), return_stats=True, backend="reference")
                for name, value in truth._asdict().items():
                    assert float(getattr(found, name)) == pytest.approx(float(value), abs=3e-5), name
                assert not found.accuracy_x_to_y.requires_grad
                assert float(loss) == pytest.approx(float(info_nce(**arguments, backend=backend)), rel=1e-6)

    @pytest.mark.parametrize(("backend", "device"), BACKENDS)
    def test_ties_go_to_the_lowest_index(self, backend: str, device: str) -> None:
        x, y = torch.ones(3, 4, device=device), torch.ones(3, 4, device=device)
        _, stats = info_nce(x, y, return_stats=True, backend=backend)
        assert float(stats.accuracy_x_to_y) == pytest.approx(1 / 3)
        assert float(stats.entropy_y_to_x) == pytest.approx(math.log(3))
        assert float(stats.bound_x_to_y) == pytest.approx(0.0, abs=1e-6)

    @pytest.mark.parametrize(("backend", "device"), BACKENDS)
    def test_bound_counts_the_candidates_that_stay(self, backend: str, device: str) -> None:
        """A queue alone: one positive and seven negatives, so the ceiling is log 8, not log 11."""
        x, y = torch.eye(4, device=device), torch.eye(4, device=device)
        _, stats = info_nce(
            x,
            y,
            scale=1000.0,
            negatives=-torch.ones(7, 4, device=device),
            exclude=torch.zeros(4, dtype=torch.int64, device=device),
            direction="x_to_y",
            return_stats=True,
            backend=backend,
        )
        assert float(stats.bound_x_to_y) == pytest.approx(math.log(8), rel=1e-6)
        assert stats.bound_y_to_x is None and stats.accuracy_y_to_x is None


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
        torch.testing.assert_close(info_nce(x, y, backend=backend), expected, rtol=1e-6, atol=0)

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


@pytest.mark.parametrize("backend", ["reference", "cpu"])
class TestProperties:
    sizes = st.integers(1, 40)

    @given(
        rows=sizes, columns=sizes, width=st.integers(1, 20), positives=st.sampled_from(POSITIVES), seed=sizes
    )
    def test_swapping_sides(
        self, backend: str, rows: int, columns: int, width: int, positives: str, seed: int
    ) -> None:
        arguments = make_inputs(Shape(rows, columns, width), positives=positives, seed=seed)
        which = arguments.pop("positives", None)
        if isinstance(which, tuple):
            swapped: Any = which[::-1]
        elif which is None:
            swapped = None
        elif which.layout == torch.sparse_csr:
            swapped = which.to_dense().T.to_sparse_csr()
        else:
            swapped = (torch.arange(columns), which)
        x, y, scale = (arguments[k] for k in ("x", "y", "scale"))
        forward = info_nce(
            x, y, scale=scale, positives=which, direction="x_to_y", reduction="none", backend=backend
        )
        back = info_nce(
            y, x, scale=scale, positives=swapped, direction="y_to_x", reduction="none", backend=backend
        )
        torch.testing.assert_close(forward, back, rtol=2e-5, atol=2e-5)

    @given(rows=sizes, width=st.integers(1, 20), seed=sizes)
    def test_permuting_rows(self, backend: str, rows: int, width: int, seed: int) -> None:
        arguments = make_inputs(Shape(rows, rows, width), positives="ids", seed=seed)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        x_ids, y_ids = arguments["positives"]
        losses = info_nce(**arguments, reduction="none", direction="x_to_y", backend=backend)
        arguments.update(x=arguments["x"][order], positives=(x_ids[order], y_ids))
        permuted = info_nce(**arguments, reduction="none", direction="x_to_y", backend=backend)
        torch.testing.assert_close(permuted, losses[order], rtol=2e-5, atol=2e-5)

    @given(rows=sizes, columns=sizes, shift=st.floats(-50, 50))
    def test_shifting_scores(self, backend: str, rows: int, columns: int, shift: float) -> None:
        scores = torch.randn(
            rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64
        )
        plain = info_nce_from_scores(scores, backend=backend)
        torch.testing.assert_close(
            info_nce_from_scores(scores + shift, backend=backend), plain, rtol=1e-9, atol=1e-9
        )

    @given(rows=sizes, width=st.integers(1, 20), seed=sizes)
    def test_never_negative_with_one_positive(self, backend: str, rows: int, width: int, seed: int) -> None:
        arguments = make_inputs(Shape(rows, rows, width), seed=seed, scale=100.0)
        assert all(
            float(loss.min()) >= -1e-5 for loss in info_nce(**arguments, reduction="none", backend=backend)
        )
