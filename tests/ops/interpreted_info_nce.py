"""The Triton kernels of the contrastive losses on CPU tensors, in Triton's interpreter, whose tiles are 16 x 16.

Run by test_info_nce_triton.py, in processes that set TRITON_INTERPRET=1 before anything imports triton.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from jrl_kernels import _triton_launch as triton_launch
from jrl_kernels._positives import Positives
from jrl_kernels._sweep import Source
from jrl_kernels.ops.info_nce import (
    triton_kernel,
)
from jrl_kernels.ops.info_nce.cases import Shape
from jrl_kernels.ops.info_nce.reference import positive_mask
from jrl_kernels.ops.info_nce.sweep import Axis, Options, Upstream
from tests.ops.interpreted_inputs import (
    HALVES_AND_FLOAT,
    SHAPE,
    logits_of,
    options_of,
    source_of,
)

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")


def expected_axis(s: Tensor, options: Options, transpose: bool) -> Axis:
    """The sums of a backend's contract over the rows of s, from dense float64 logits."""
    by_id = options.positives.x_ids is not None
    positive = positive_mask(options.positives, *s.shape) if by_id else torch.zeros_like(s, dtype=torch.bool)
    candidate = torch.ones_like(positive)
    if options.exclude_x is not None and options.exclude_y is not None:
        candidate = (options.exclude_x[:, None] != options.exclude_y[None, :]) | positive
    if transpose:
        s, positive, candidate = s.T, positive.T, candidate.T
    kept = s.masked_fill(~candidate, -math.inf)
    total = torch.logsumexp(kept, 1)
    term = None
    if by_id and options.multi_positive == "sum":
        term = torch.logsumexp(s.masked_fill(~positive, -math.inf), 1)
    elif by_id:
        term = torch.where(positive, s, 0.0).sum(1)
    if not options.details:
        return Axis(total, term)
    probability = torch.where(candidate, (kept - total[:, None]).exp(), 0.0)
    index = torch.arange(s.shape[1]).expand_as(s)
    top = kept.amax(1)
    first = torch.where(candidate & (kept == top[:, None]), index, s.shape[1]).amin(1)
    return Axis(
        total,
        term,
        top,
        torch.where(first == s.shape[1], -1, first),
        torch.where(kept == -math.inf, 0.0, probability * s).sum(1),
        candidate.sum(1).double(),
    )


def assert_axis(found: Axis | None, expected: Axis, tolerance: float = 1e-5) -> None:
    assert found is not None
    for name, value in expected._asdict().items():
        got = getattr(found, name)
        if value is None:
            assert got is None, name
            continue
        if name == "argmax":
            assert got.dtype == torch.int64
            assert torch.equal(got, value), name
            continue
        assert got.dtype == torch.float32, name
        torch.testing.assert_close(
            got.double(), value, rtol=tolerance, atol=tolerance, msg=partial("{}: {}".format, name)
        )


def assert_statistics(source: Source, options: Options, tolerance: float = 1e-5) -> None:
    found = triton_kernel.statistics(source, options)
    s = logits_of(source)
    for axis, wanted, transpose in (
        (found.rows, options.rows, False),
        (found.columns, options.columns, True),
    ):
        if wanted:
            assert_axis(axis, expected_axis(s, options, transpose), tolerance)
        else:
            assert axis is None
    if options.positives.rows is None:
        assert found.pair_logits is None
    else:
        assert found.pair_logits is not None
        exact = s[options.positives.rows, options.positives.columns]
        torch.testing.assert_close(found.pair_logits.double(), exact, rtol=tolerance, atol=tolerance)


class TestStatistics:
    @pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
    @pytest.mark.parametrize("kind", ["listed", "ids"])
    @pytest.mark.parametrize("scores", [False, True])
    def test_every_option(self, dtype: torch.dtype, kind: str, scores: bool) -> None:
        source = source_of(SHAPE, dtype, scores=scores)
        for exclude, multi_positive in ((False, "mean"), (True, "sum")):
            assert_statistics(
                source, options_of(kind, SHAPE, exclude=exclude, multi_positive=multi_positive, details=True)
            )
        assert_statistics(source, options_of(kind, SHAPE))

    @pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True)])
    def test_one_direction(self, rows: bool, columns: bool) -> None:
        for kind in ("none", "ids"):
            assert_statistics(
                source_of(SHAPE), options_of(kind, SHAPE, rows=rows, columns=columns, details=True)
            )

    @pytest.mark.parametrize(
        "shape", [Shape(1, 1, 1), Shape(1, 40, 3), Shape(40, 1, 17), Shape(32, 16, 16), Shape(33, 33, 33)]
    )
    def test_shapes(self, shape: Shape) -> None:
        assert_statistics(source_of(shape), options_of("ids", shape, details=True, exclude=True))

    @pytest.mark.parametrize("scale", [-2.0, 0.0, 30.0])
    def test_scales(self, scale: float) -> None:
        assert_statistics(
            source_of(SHAPE, scale=scale), options_of("ids", SHAPE, multi_positive="sum"), tolerance=3e-5
        )

    def test_partials_in_several_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Columns are swept in chunks whose partials fit the budget, and the rows' results carried from one to the next."""
        monkeypatch.setattr(triton_launch, "PARTIALS_BYTES", 1)
        for exclude, multi_positive in ((False, "mean"), (True, "sum")):
            assert_statistics(
                source_of(Shape(21, 70, 5)),
                options_of(
                    "ids", Shape(21, 70, 5), exclude=exclude, multi_positive=multi_positive, details=True
                ),
            )

    def test_more_tiles_than_one_step_of_the_reduction(self) -> None:
        shape = Shape(5, 16 * 17 + 3, 2)
        assert_statistics(source_of(shape), options_of("ids", shape, details=True, multi_positive="sum"))

    @pytest.mark.parametrize("chunk", [1, 1 << 30])
    def test_ties_go_to_the_lowest_index(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_launch, "PARTIALS_BYTES", chunk)
        shape = Shape(40, 50, 4)
        source = Source(torch.ones(40, 4), torch.ones(50, 4), None, torch.tensor(1.0))
        options = options_of("none", shape, details=True)._replace(
            exclude_x=torch.zeros(40, dtype=torch.int64), exclude_y=(torch.arange(50) >= 20).long()
        )
        found = triton_kernel.statistics(source, options)
        assert found.rows is not None
        assert found.columns is not None
        assert torch.equal(found.rows.argmax, torch.full((40,), 20))
        assert torch.equal(found.columns.argmax, torch.where(torch.arange(50) >= 20, 0, -1))

    @pytest.mark.parametrize("chunk", [1, 1 << 30])
    def test_rows_without_candidates(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_launch, "PARTIALS_BYTES", chunk)
        shape = Shape(20, 40, 4)
        options = options_of("none", shape, details=True)._replace(
            exclude_x=torch.arange(20) // 19, exclude_y=torch.zeros(40, dtype=torch.int64)
        )
        assert_statistics(source_of(shape), options)
        found = triton_kernel.statistics(source_of(shape), options)
        assert found.rows is not None
        assert torch.equal(found.rows.log_sum_exp[:19], torch.full((19,), -math.inf))
        assert found.rows.argmax is not None
        assert (found.rows.argmax[:19] == -1).all()

    @pytest.mark.parametrize("chunk", [1, 1 << 30])
    def test_nan_reaches_its_row_and_every_column(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_launch, "PARTIALS_BYTES", chunk)
        source = source_of(SHAPE)
        assert source.x is not None
        source.x[3, 2] = math.nan
        found = triton_kernel.statistics(source, options_of("none", SHAPE, details=True))
        assert found.rows is not None
        assert found.columns is not None
        assert torch.equal(found.rows.log_sum_exp.isnan(), torch.arange(SHAPE.rows) == 3)
        assert found.columns.log_sum_exp.isnan().all()
        assert found.rows.argmax is not None
        assert found.columns.argmax is not None
        assert ((found.rows.argmax >= -1) & (found.rows.argmax < SHAPE.columns)).all()
        assert ((found.columns.argmax >= 0) & (found.columns.argmax < SHAPE.rows)).all()

    def test_infinite_scores(self) -> None:
        source = source_of(SHAPE, scores=True)
        assert source.scores is not None
        source.scores[2] = -math.inf
        source.scores[5, 20] = math.inf
        found = triton_kernel.statistics(source, options_of("none", SHAPE))
        assert found.rows is not None
        expected = torch.logsumexp(logits_of(source), 1)
        torch.testing.assert_close(found.rows.log_sum_exp.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0)])
    @pytest.mark.parametrize("multi_positive", ["mean", "sum"])
    def test_empty(self, rows: int, columns: int, multi_positive: str) -> None:
        shape = Shape(rows, columns, 4)
        options = options_of("ids", shape, multi_positive=multi_positive, details=True)
        found = triton_kernel.statistics(source_of(shape), options)
        for axis, length in ((found.rows, rows), (found.columns, columns)):
            assert axis is not None
            assert torch.equal(axis.log_sum_exp, torch.full((length,), -math.inf))
            assert axis.positive is not None
            assert torch.equal(
                axis.positive, torch.full((length,), -math.inf if multi_positive == "sum" else 0.0)
            )
            assert axis.argmax is not None
            assert torch.equal(axis.argmax, torch.full((length,), -1))

    def test_no_width(self) -> None:
        shape = Shape(3, 5, 0)
        assert_statistics(source_of(shape), options_of("none", shape))

    def test_a_pair_that_does_not_exist(self) -> None:
        """On a GPU its assertion fails later than the launch: nothing may be read out of bounds meanwhile."""
        pairs = Positives(rows=torch.tensor([0, 21, -1, 2]), columns=torch.tensor([0, 0, 0, 30]))
        found = triton_kernel.statistics(
            source_of(SHAPE), options_of("none", SHAPE)._replace(positives=pairs)
        )
        assert found.pair_logits is not None
        assert found.pair_logits.isnan().tolist() == [False, True, True, True]


def upstream_of(s: Tensor, options: Options) -> Upstream:
    """An upstream as the losses make it, in float32."""
    sides: list[Tensor | None] = []
    for transpose, wanted in ((False, options.rows), (True, options.columns)):
        axis = expected_axis(s, options, transpose)
        if not wanted:
            sides += [None, None, None]
            continue
        length = axis.log_sum_exp.shape[0]
        grad = torch.linspace(0.01, 0.03, length)
        positive = None
        if axis.positive is not None:
            count = positive_mask(options.positives, *s.shape).sum(0 if transpose else 1)
            has = count > 0
            grad = torch.where(has, grad, 0.0)
            lost = torch.where(has, axis.log_sum_exp, math.inf).float()
            share = grad / count.clamp(min=1)
            positive = (
                share
                if options.multi_positive == "mean"
                else torch.where(has, axis.positive, math.inf).float()
            )
            sides += [grad, lost, positive]
        else:
            sides += [grad, axis.log_sum_exp.float(), None]
    pairs = options.positives.rows
    sides.append(None if pairs is None else torch.linspace(-0.5, 0.5, pairs.numel()))
    return Upstream(*sides)


def expected_gradient(s: Tensor, options: Options, upstream: Upstream) -> Tensor:
    by_id = options.positives.x_ids is not None
    positive = positive_mask(options.positives, *s.shape) if by_id else torch.zeros_like(s, dtype=torch.bool)
    g = torch.zeros_like(s)
    sides = (
        (upstream.grad_x, upstream.log_sum_exp_x, upstream.positive_x, 1),
        (upstream.grad_y, upstream.log_sum_exp_y, upstream.positive_y, 0),
    )
    for grad, total, term, axis in sides:
        if grad is None or total is None:
            continue
        g += grad.double().unsqueeze(axis) * (s - total.double().unsqueeze(axis)).exp()
        if term is None:
            continue
        if options.multi_positive == "mean":
            g -= positive * term.double().unsqueeze(axis)
        else:
            share = grad.double().unsqueeze(axis) * (s - term.double().unsqueeze(axis)).exp()
            g -= torch.where(positive, share, 0.0)
    if options.exclude_x is not None and options.exclude_y is not None:
        g = g.masked_fill((options.exclude_x[:, None] == options.exclude_y[None, :]) & ~positive, 0.0)
    if upstream.pair_gradient is not None:
        assert options.positives.rows is not None
        g[options.positives.rows, options.positives.columns] = upstream.pair_gradient.double()
    return g


class TestGradient:
    @pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
    @pytest.mark.parametrize("kind", ["listed", "ids"])
    @pytest.mark.parametrize("scores", [False, True])
    def test_tiles(self, dtype: torch.dtype, kind: str, scores: bool) -> None:
        source = source_of(SHAPE, dtype, scale=0.7, scores=scores)
        s = logits_of(source)
        precise = dtype == torch.float32 or scores
        for exclude, multi_positive, rows, columns in (
            (False, "mean", True, True),
            (True, "sum", True, True),
            (True, "mean", True, False),
            (False, "sum", False, True),
        ):
            options = options_of(
                kind, SHAPE, exclude=exclude, multi_positive=multi_positive, rows=rows, columns=columns
            )
            upstream = upstream_of(s, options)
            tile, block = triton_kernel.softmax_gradient(source, options, upstream)
            assert block[0] >= SHAPE.rows
            assert block[1] >= SHAPE.columns
            expected = expected_gradient(s, options, upstream)
            unit = getattr(tile, "unit", None)
            assert (unit is not None) == (dtype == torch.float16 and not scores)
            for r0, r1, c0, c1 in ((0, 21, 0, 30), (3, 20, 13, 29), (20, 21, 29, 30)):
                found = tile(r0, r1, c0, c1)
                assert found.dtype == (torch.float32 if scores else dtype)
                found = found.double() * (1.0 if unit is None else unit.double())
                tolerance = 2e-6 if precise else 5e-3
                torch.testing.assert_close(
                    found,
                    expected[r0:r1, c0:c1],
                    rtol=tolerance * 5,
                    atol=tolerance * float(expected.abs().max()),
                )

    def test_float16_keeps_small_entries(self) -> None:
        """A mean over many rows makes entries that float16 by itself rounds to zero."""
        source = source_of(SHAPE, torch.float16, scale=0.1)
        options = options_of("listed", SHAPE)
        s = logits_of(source)
        upstream = upstream_of(s, options)
        assert upstream.grad_x is not None
        assert upstream.grad_y is not None
        assert upstream.pair_gradient is not None
        small = upstream._replace(
            grad_x=upstream.grad_x * 1e-9,
            grad_y=upstream.grad_y * 1e-9,
            pair_gradient=upstream.pair_gradient * 1e-9,
        )
        tile, _ = triton_kernel.softmax_gradient(source, options, small)
        assert isinstance(tile, triton_kernel._Gradient)
        assert tile.unit is not None
        found = tile(0, 21, 0, 30).double() * tile.unit.double()
        torch.testing.assert_close(found, expected_gradient(s, options, small), rtol=2e-3, atol=0)

    def test_float16_without_gradient(self) -> None:
        source, options = source_of(SHAPE, torch.float16), options_of("none", SHAPE)
        upstream = upstream_of(logits_of(source), options)
        upstream = upstream._replace(grad_x=torch.zeros(21), grad_y=torch.zeros(30))
        tile, _ = triton_kernel.softmax_gradient(source, options, upstream)
        assert not tile(0, 21, 0, 30).any()

    def test_a_nan_stays_in_its_row_and_column(self) -> None:
        source, options = source_of(SHAPE), options_of("none", SHAPE, columns=False)
        upstream = upstream_of(logits_of(source), options)
        assert upstream.log_sum_exp_x is not None
        upstream.log_sum_exp_x[4] = math.nan
        tile, _ = triton_kernel.softmax_gradient(source, options, upstream)
        bad = tile(0, 21, 0, 30).isnan()
        assert bad[4].all()
        assert int(bad.sum()) == SHAPE.columns
