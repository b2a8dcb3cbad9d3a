"""Values and gradients of the ranking loss: float64 truth, every gradient, properties."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jrl_kernels import ranking_loss, ranking_loss_from_scores
from jrl_kernels.ops.ranking_loss.cases import SHAPES, Shape, make_inputs
from tests.ops.conformance import (
    BACKENDS,
    FUSED,
    FUSED_DTYPES,
    assert_close_to_truth,
    cast,
    value_and_gradients,
)

DIRECTIONS = ("both", "x_to_y", "y_to_x")


def judge(backend: str, dtype: torch.dtype, arguments: dict[str, Any], **options: Any) -> None:
    """`arguments` are in `dtype`; the truth is the reference on the same numbers in float64."""
    function = ranking_loss_from_scores if "scores" in arguments else ranking_loss
    call = partial(function, reduction="none", **options)
    fused = value_and_gradients(partial(call, backend=backend), arguments)
    plain = value_and_gradients(partial(call, backend="reference"), arguments)
    truth = value_and_gradients(partial(call, backend="reference"), cast(arguments, torch.float64))
    assert_close_to_truth(fused, plain, truth, dtype)
    assert any(float(value.abs().max()) > 0 for value in truth.values() if value.numel()) or (
        len(truth["output 0"]) == 1
    )


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["cosine", "dot", "order"])
def test_every_option_against_float64(
    backend: str, device: str, dtype: torch.dtype, shape: str, metric: str
) -> None:
    margin = 0.02 if metric == "order" else 0.2
    for direction, hardest, exclude in itertools.product(DIRECTIONS, (False, True), (False, True)):
        arguments = make_inputs(SHAPES[shape], dtype=dtype, device=device, metric=metric, exclude=exclude)
        judge(backend, dtype, arguments, direction=direction, hardest=hardest, margin=margin)


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("metric", ["dot", "order"])
def test_many_tiles(backend: str, device: str, metric: str, nan_filled_allocations: None) -> None:
    """More than one tile each way, none of them whole; in memory that starts as NaN."""
    shapes = (
        [Shape(1100, 1303, 24, 1030), Shape(2070, 1030, 24)]
        if metric == "dot"
        else [Shape(1030, 1040, 3, 300)]
    )
    for shape, hardest, exclude in itertools.product(shapes, (False, True), (False, True)):
        arguments = make_inputs(shape, device=device, metric=metric, exclude=exclude)
        judge(backend, torch.float32, arguments, hardest=hardest)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "order"])
@pytest.mark.parametrize("hardest", [False, True])
def test_gradcheck(backend: str, metric: str, hardest: bool) -> None:
    for rows, columns in ((5, 7), (7, 5)):
        arguments = make_inputs(Shape(rows, columns, 3, 4), dtype=torch.float64, metric=metric, exclude=True)

        def loss(x: Tensor, y: Tensor, arguments: dict[str, Any] = arguments) -> Any:
            given = {**arguments, "x": x, "y": y}
            return ranking_loss(**given, margin=0.3, hardest=hardest, reduction="none", backend=backend)

        assert torch.autograd.gradcheck(loss, (arguments["x"], arguments["y"]))


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("hardest", [False, True])
def test_each_gradient_alone(backend: str, device: str, hardest: bool) -> None:
    for metric in ("dot", "order"):
        call = partial(ranking_loss, hardest=hardest, backend=backend)
        arguments = make_inputs(SHAPES["ragged"], device=device, metric=metric)
        everything = value_and_gradients(call, arguments)
        for name in ("x", "y"):
            alone = {
                k: v.detach() if isinstance(v, Tensor) and k != name else v for k, v in arguments.items()
            }
            found = value_and_gradients(call, alone)
            assert set(found) == {"output 0", f"d {name}"}
            torch.testing.assert_close(found[f"d {name}"], everything[f"d {name}"], rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores(backend: str, device: str, dtype: torch.dtype) -> None:
    for shape, hardest, exclude, direction in itertools.product(
        ("ragged", "tall"), (False, True), (False, True), DIRECTIONS
    ):
        arguments = make_inputs(SHAPES[shape], device=device, exclude=exclude)
        scores = (arguments["x"] @ arguments["y"].T).detach().to(dtype).requires_grad_()
        given: dict[str, Any] = {"scores": scores}
        if exclude:
            given["exclude"] = arguments["exclude"][:2]
        judge(backend, dtype, given, hardest=hardest, direction=direction)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_scores_give_the_same_loss(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["tall"], device=device, metric="dot")
    x, y = arguments["x"].detach(), arguments["y"].detach()
    for hardest in (False, True):
        direct = ranking_loss(x, y, metric="dot", hardest=hardest, backend=backend)
        by_scores = ranking_loss_from_scores(x @ y.T, hardest=hardest, backend=backend)
        torch.testing.assert_close(direct, by_scores, rtol=2e-5, atol=2e-5)


def test_against_loops() -> None:
    """The definition, one pair at a time."""
    arguments = make_inputs(Shape(5, 7, 3, 4), dtype=torch.float64, metric="dot", exclude=True)
    x, y, queue = (arguments[name].detach() for name in ("x", "y", "negatives"))
    x_ids, y_ids, queue_ids = (ids.tolist() for ids in arguments["exclude"])
    for hardest in (False, True):
        rows, columns = [], []
        for i in range(5):
            keys = [y[j] for j in range(7) if j != i and y_ids[j] != x_ids[i]]
            keys += [queue[k] for k in range(4) if queue_ids[k] != x_ids[i]]
            terms = [max(0.0, float(0.3 - x[i] @ y[i] + x[i] @ key)) for key in keys]
            rows.append(max(terms, default=0.0) if hardest else sum(terms))
        for j in range(7):
            keys = [x[i] for i in range(5) if i != j and y_ids[j] != x_ids[i]]
            terms = [max(0.0, float(0.3 - x[j] @ y[j] + key @ y[j])) for key in keys] if j < 5 else []
            columns.append(max(terms, default=0.0) if hardest else sum(terms))
        for backend in ("reference", "cpu"):
            found = ranking_loss(**arguments, margin=0.3, hardest=hardest, reduction="none", backend=backend)
            assert isinstance(found, tuple)
            assert found[0].tolist() == pytest.approx(rows, abs=1e-12)
            assert found[1].tolist() == pytest.approx(columns, abs=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
class TestProperties:
    sizes = st.integers(1, 40)
    kinds = st.booleans()

    @given(rows=sizes, columns=sizes, width=st.integers(1, 20), hardest=kinds, seed=sizes)
    def test_swapping_sides(
        self, backend: str, rows: int, columns: int, width: int, hardest: bool, seed: int
    ) -> None:
        arguments = make_inputs(Shape(rows, columns, width), metric="dot", exclude=True, seed=seed)
        call = partial(ranking_loss, metric="dot", hardest=hardest, reduction="none", backend=backend)
        x, y, exclude = arguments["x"], arguments["y"], arguments["exclude"]
        forward = call(x, y, exclude=exclude, direction="x_to_y")
        back = call(y, x, exclude=exclude[::-1], direction="y_to_x")
        torch.testing.assert_close(forward, back, rtol=2e-5, atol=2e-5)

    @given(rows=sizes, width=st.integers(1, 20), hardest=kinds, seed=sizes)
    def test_permuting_pairs(self, backend: str, rows: int, width: int, hardest: bool, seed: int) -> None:
        arguments = make_inputs(Shape(rows, rows, width), dtype=torch.float64, seed=seed)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        call = partial(ranking_loss, hardest=hardest, reduction="none", backend=backend)
        losses = call(arguments["x"], arguments["y"])
        permuted = call(arguments["x"][order], arguments["y"][order])
        for before, after in zip(losses, permuted, strict=True):
            torch.testing.assert_close(after, before[order], rtol=1e-9, atol=1e-9)

    @given(rows=sizes, columns=sizes, hardest=kinds, shift=st.floats(-50, 50))
    def test_shifting_scores(
        self, backend: str, rows: int, columns: int, hardest: bool, shift: float
    ) -> None:
        generator = torch.Generator().manual_seed(rows)
        scores = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        call = partial(ranking_loss_from_scores, hardest=hardest, backend=backend)
        torch.testing.assert_close(call(scores + shift), call(scores), rtol=1e-9, atol=1e-9)

    @given(rows=sizes, columns=sizes, queue=st.integers(0, 9), margin=st.floats(0, 2), seed=sizes)
    def test_the_hardest_is_one_of_the_sum(
        self, backend: str, rows: int, columns: int, queue: int, margin: float, seed: int
    ) -> None:
        arguments = make_inputs(Shape(rows, columns, 5, queue), dtype=torch.float64, seed=seed)
        call = partial(ranking_loss, **arguments, margin=margin, reduction="none", backend=backend)
        for hardest, total in zip(call(hardest=True), call(hardest=False), strict=True):
            assert bool((hardest <= total + 1e-12).all())
            assert torch.equal(hardest > 0, total > 0)

    @given(rows=sizes, queue=st.integers(1, 9), hardest=kinds, seed=sizes)
    def test_a_queue_is_more_columns(
        self, backend: str, rows: int, queue: int, hardest: bool, seed: int
    ) -> None:
        arguments = make_inputs(Shape(rows, rows, 6, queue), dtype=torch.float64, metric="dot", seed=seed)
        x, y, negatives = (arguments[name] for name in ("x", "y", "negatives"))
        call = partial(
            ranking_loss, metric="dot", hardest=hardest, direction="x_to_y", reduction="none", backend=backend
        )
        joined = call(x, torch.cat([y, negatives]))
        torch.testing.assert_close(call(x, y, negatives=negatives), joined, rtol=1e-9, atol=1e-9)
