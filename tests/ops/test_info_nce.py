"""Values and gradients of the contrastive losses: float64 truth, every gradient, statistics, properties."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jrl_kernels import info_nce, info_nce_from_scores
from jrl_kernels.ops.info_nce.cases import POSITIVES, SHAPES, Shape, make_inputs
from tests.ops.conformance import (
    BACKENDS,
    FUSED,
    FUSED_DTYPES,
    assert_close_to_truth,
    cast,
    value_and_gradients,
)


def judge(backend: str, dtype: torch.dtype, arguments: dict[str, Any], **options: Any) -> None:
    """`arguments` are in `dtype`; the truth is the reference on the same numbers in float64."""
    call = partial(info_nce, reduction="none", **options)
    fused = value_and_gradients(partial(call, backend=backend), arguments)
    plain = value_and_gradients(partial(call, backend="reference"), arguments)
    truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
    assert_close_to_truth(fused, plain, truth, dtype)


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positives", POSITIVES)
def test_every_option_against_float64(
    backend: str, device: str, dtype: torch.dtype, shape: str, positives: str
) -> None:
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
