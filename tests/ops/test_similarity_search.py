"""similarity_topk, retrieval_ranks and agreement_topk: exact integers, ties, exclusions, NaN, tiles, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jrl_kernels import agreement_topk, retrieval_ranks, similarity_topk
from jrl_kernels.ops.similarity import cpu, search
from jrl_kernels.ops.similarity.cases import POSITIVES, SHAPES, Shape, make_inputs
from tests.ops.conformance import BACKENDS, FUSED, FUSED_DTYPES, det

pytestmark = [
    pytest.mark.usefixtures("nan_filled_allocations"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
]
METRICS = ("cosine", "dot", "order")


def unit(rows: int, a: float, device: str) -> Tensor:
    vectors = F.normalize(det(rows, 5, a=a), dim=1)
    return vectors.to(device, torch.float64 if device == "cpu" else torch.float32)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_golden_agreement(backend: str, device: str) -> None:
    v, a = unit(6, 0.37, device), unit(6, 0.53, device)
    others = torch.arange(6, device=device)
    found = {
        "consensus": agreement_topk(v, a, 2, backend=backend),
        "union": agreement_topk(v, a, 2, combine="max", backend=backend),
        "video": similarity_topk(v, v, 2, exclude=others, backend=backend),
        "audio": similarity_topk(a, a, 2, exclude=others, backend=backend),
    }
    assert {name: indices.sort(1).values.tolist() for name, (_, indices) in found.items()} == {
        "consensus": [[3, 4], [4, 5], [3, 5], [0, 1], [0, 1], [1, 2]],
        "union": [[4, 5], [3, 4], [0, 5], [0, 1], [0, 1], [0, 2]],
        "video": [[3, 4], [4, 5], [1, 5], [0, 4], [0, 1], [1, 2]],
        "audio": [[2, 5], [3, 4], [0, 4], [1, 5], [1, 2], [0, 3]],
    }
    values, indices = agreement_topk(v, a, 6, backend=backend)
    row = [-0.12269896, -0.44512405, -0.91468522, -0.94860044, -0.9928806, -math.inf]
    assert values[0].tolist() == pytest.approx(row, rel=2e-5 if device == "cuda" else 5e-8)
    assert indices[0].tolist() == [3, 4, 1, 2, 5, -1]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_golden_ranks(backend: str, device: str) -> None:
    dtype = torch.float64 if device == "cpu" else torch.float32
    scores, eye = det(5, 5, a=0.37).to(device, dtype), torch.eye(5, dtype=dtype, device=device)
    assert retrieval_ranks(scores, eye, metric="dot", backend=backend).tolist() == [4, 1, 4, 1, 4]
    assert retrieval_ranks(scores.T, eye, metric="dot", backend=backend).tolist() == [2, 2, 4, 1, 2]


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_are_those_of_float64(
    backend: str, device: str, dtype: torch.dtype, metric: str, shape: str
) -> None:
    for positives in POSITIVES:
        inputs = make_inputs(
            SHAPES[shape], dtype=dtype, device=device, metric=metric, positives=positives, duplicates=True
        )
        found, truth = (retrieval_ranks(**inputs, backend=name) for name in (backend, "reference"))
        assert found.dtype == torch.int64
        assert torch.equal(found, truth), positives


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_is_that_of_float64(
    backend: str, device: str, dtype: torch.dtype, metric: str, shape: str
) -> None:
    columns = SHAPES[shape].columns
    inputs = make_inputs(
        SHAPES[shape], dtype=dtype, device=device, metric=metric, exclude=True, duplicates=True
    )
    for k in {1, (columns + 3) // 4, columns}:
        for exclude in (None, inputs["exclude"]):
            found, truth = (
                similarity_topk(**(inputs | {"exclude": exclude}), k=k, backend=name)
                for name in (backend, "reference")
            )
            assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(found[1], truth[1])
            torch.testing.assert_close(found[0], truth[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("combine", ["min", "max"])
def test_agreement_is_that_of_float64(backend: str, device: str, dtype: torch.dtype, combine: str) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(70, width, generator=generator).to(device, dtype) for width in (9, 20))
    a[40:50], b[40:50] = a[:10].clone(), b[:10].clone()
    for k in (1, 32, 70):
        found, truth = (
            agreement_topk(a, b, k, combine=combine, backend=name) for name in (backend, "reference")
        )
        assert torch.equal(found[1], truth[1])
        torch.testing.assert_close(found[0], truth[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_scores_closer_than_rounding(backend: str, device: str) -> None:
    """Columns whose scores differ by less than a float32 product's error, which a plain float32 matrix gets wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator).to(device)
    y = (torch.randn(1, 64, generator=generator) + 1e-7 * torch.randn(3000, 64, generator=generator)).to(
        device
    )
    index = torch.randint(3000, (40,), generator=generator).to(device)
    for metric in METRICS:
        found, truth = (
            retrieval_ranks(x, y, positives=index, metric=metric, backend=name)
            for name in (backend, "reference")
        )
        assert torch.equal(found, truth)
    scores = x @ y.T
    best = scores.gather(1, index[:, None])
    naive = (scores >= best).sum(1) - 1
    assert not torch.equal(naive, retrieval_ranks(x, y, positives=index, metric="dot", backend=backend))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_equal_rows_tie_against_the_positive_and_in_order(backend: str, device: str) -> None:
    """Over two tiles of columns, whose last is ragged: what a BLAS computes for equal rows there differs in its last bits."""
    y = torch.randn(7, 50, device=device).repeat(300, 1)[:2077]
    x = y[:5] + 0.01
    same = torch.arange(2077, device=device) % 7
    ranks = retrieval_ranks(x, y, backend=backend)
    assert ranks.tolist() == [int((same == i).sum()) - 1 for i in range(5)]
    _, indices = similarity_topk(x, y, 60, backend=backend)
    assert indices.tolist() == [[i + 7 * j for j in range(60)] for i in range(5)]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_several_positives_and_none(backend: str, device: str) -> None:
    scores = torch.tensor([[0.1, 0.9, 0.8, 0.85, 0.0], [0.5, 0.95, 0.2, 0.1, 0.6], [3.0, 1.0, 2.0, 5.0, 4.0]])
    x, eye = scores.to(device), torch.eye(5, device=device)
    ids = torch.tensor([7, 9, 8], device=device), torch.tensor([7, 7, 7, 9, 9], device=device)
    assert retrieval_ranks(x, eye, positives=ids, metric="dot", backend=backend).tolist() == [0, 1, 5]
    listed = (ids[0][:, None] == ids[1]).to_sparse_csr()
    assert retrieval_ranks(x, eye, positives=listed, metric="dot", backend=backend).tolist() == [0, 1, 5]
    assert retrieval_ranks(x[:, :2], eye[:2, :2], metric="dot", backend=backend).tolist() == [1, 0, 2]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nan_never_improves_a_rank(backend: str, device: str) -> None:
    x, y = torch.eye(4, device=device), torch.eye(4, device=device)
    x[1, 1], y[2, 3] = math.nan, math.nan
    # Row 1 has a NaN positive; rows 0 and 3 meet a NaN in column 2, which row 2 has as its positive.
    assert retrieval_ranks(x, y, metric="dot", backend=backend).tolist() == [1, 3, 3, 1]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_nan_infinite_huge_and_zero(backend: str, device: str, metric: str) -> None:
    x, y = torch.randn(9, 6, device=device), torch.randn(40, 6, device=device)
    x[1, 0], x[2], x[3], x[4] = math.nan, 0.0, 1e30, 1e-38
    y[3, 5], y[4, 1], y[5], y[6], y[7] = math.nan, math.inf, 0.0, 1e30, 1e-38
    found, truth = (retrieval_ranks(x, y, metric=metric, backend=name) for name in (backend, "reference"))
    assert torch.equal(found, truth)
    found_list, true_list = (
        similarity_topk(x, y, 40, metric=metric, backend=name) for name in (backend, "reference")
    )
    assert torch.equal(found_list[1], true_list[1])
    torch.testing.assert_close(found_list[0], true_list[0], rtol=1e-6, atol=0, equal_nan=True)
    assert found_list[0][1].isnan().all()
    assert found_list[0][0, 0].isnan()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_excluded_pairs_never_appear(backend: str, device: str) -> None:
    x = torch.randn(12, 4, device=device)
    labels = torch.arange(12, device=device) % 3
    values, indices = similarity_topk(x, x, 12, exclude=labels, metric="dot", backend=backend)
    assert values[:, 8:].eq(-math.inf).all() and indices[:, 8:].eq(-1).all()
    assert (labels[indices[:, :8]] != labels[:, None]).all()
    assert [len(set(row)) for row in indices[:, :8].tolist()] == [8] * 12
    everything = similarity_topk(x, x, 3, exclude=torch.zeros_like(labels), backend=backend)
    assert everything[0].eq(-math.inf).all() and everything[1].eq(-1).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(0, 3, 4), (3, 0, 4), (3, 5, 0), (0, 0, 4), (1, 1, 1)]
)
def test_empty(backend: str, device: str, rows: int, columns: int, width: int) -> None:
    x, y = torch.ones(rows, width, device=device), torch.ones(columns, width, device=device)
    ranks = retrieval_ranks(x, y, metric="dot", backend=backend)
    assert ranks.tolist() == ([max(columns - 1, 0)] * rows if columns else [0] * rows)
    if columns:
        values, indices = similarity_topk(x, y, columns, metric="dot", backend=backend)
        assert indices.tolist() == [list(range(columns))] * rows
        assert values.tolist() == [[float(width)] * columns] * rows


@pytest.mark.parametrize("metric", METRICS)
def test_tiles_do_not_matter(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(SHAPES["ragged"], metric=metric, positives="sparse", duplicates=True)
    ranks = retrieval_ranks(**inputs, backend="cpu")
    inputs.pop("positives")
    values, indices = similarity_topk(**inputs, k=9, backend="cpu")
    for block in ((1, 1), (5, 7), (64, 3)):
        monkeypatch.setattr(cpu, "BLOCK", block)
        tiled = make_inputs(SHAPES["ragged"], metric=metric, positives="sparse", duplicates=True)
        assert torch.equal(retrieval_ranks(**tiled, backend="cpu"), ranks)
        found = similarity_topk(**inputs, k=9, backend="cpu")
        assert torch.equal(found[0], values) and torch.equal(found[1], indices)


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 40), width=st.integers(1, 8), seed=st.integers(0, 99),
    metric=st.sampled_from(METRICS), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_permutations_and_scales(
    rows: int, columns: int, width: int, seed: int, metric: str, dtype: torch.dtype
) -> None:
    """Integer coordinates make many ties. Permuting y permutes the neighbours' scores not at all, and no rank changes."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-2, 3, (n, width), generator=generator).to(dtype) for n in (rows, columns))
    index = torch.randint(columns, (rows,), generator=generator)
    order = torch.randperm(columns, generator=generator)
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    ranks = retrieval_ranks(x, y, positives=index, metric=metric, backend="cpu")
    assert torch.equal(
        retrieval_ranks(x, y[order], positives=back[index], metric=metric, backend="cpu"), ranks
    )
    assert torch.equal(retrieval_ranks(x, y, positives=index, metric=metric, backend="reference"), ranks)
    assert torch.equal(retrieval_ranks(4 * x, 4 * y, positives=index, metric=metric, backend="cpu"), ranks)
    k = (columns + 1) // 2
    values, indices = similarity_topk(x, y, k, metric=metric, backend="cpu")
    assert torch.equal(similarity_topk(x, y[order], k, metric=metric, backend="cpu")[0], values)
    assert (values.diff(dim=1) <= 0).all()
    assert (indices.diff(dim=1) > 0)[values.diff(dim=1) == 0].all()


def test_bounds_cover_what_a_blas_rounds() -> None:
    """The distance of a tile's scores from the exact ones, as a share of the bound: below one everywhere, with room."""
    for metric in METRICS:
        for dtype in (torch.float32, torch.float64):
            inputs = make_inputs(Shape(200, 300, 700), dtype=dtype, metric=metric)
            pairs = search.Pairs(inputs["x"], inputs["y"], metric)
            bounds = search.rounding(pairs)
            ((tile, _, _),) = search.tiles(pairs, cpu)
            score = tile * bounds.row_scale[:, None] * bounds.column_scale
            tolerance = bounds.row_error[:, None] * bounds.column_error + bounds.relative * score.abs()
            exact = torch.full((200, 300), torch.nan, dtype=dtype)
            values, indices = similarity_topk(inputs["x"], inputs["y"], 300, metric=metric, backend="cpu")
            exact.scatter_(1, indices, values)
            share = float(((score.double() - exact.double()).abs() / tolerance.double()).max())
            assert 0 < share < 0.5, (metric, dtype, share)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_same_bits_twice_whatever_the_strides(backend: str, device: str) -> None:
    x, y = torch.randn(33, 60, device=device).T[::2], torch.randn(1, 33, device=device).expand(20, 33)
    first = similarity_topk(x, y, 7, backend=backend)
    second = similarity_topk(x.contiguous(), y.contiguous(), 7, backend=backend)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(
        retrieval_ranks(x, y, backend=backend), retrieval_ranks(x.contiguous(), y, backend=backend)
    )


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_opcheck(backend: str, device: str) -> None:
    x, y = torch.randn(3, 5, device=device), torch.randn(4, 5, device=device)
    ids = torch.arange(3, device=device), torch.arange(4, device=device)
    topk, ranks = torch.ops.jrl.similarity_topk.default, torch.ops.jrl.retrieval_ranks.default
    torch.library.opcheck(topk, (x, y, None, None, *ids, 2, "cosine", backend))
    torch.library.opcheck(topk, (x, x, y[:3], y[:3], ids[0], ids[0], 2, "min", backend))
    torch.library.opcheck(ranks, (x, y, *ids, None, None, "dot", backend))
    torch.library.opcheck(ranks, (x, y, None, None, ids[0], ids[0], "order", backend))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiles_whole_and_has_no_gradient(backend: str, device: str) -> None:
    torch._dynamo.reset()
    x, y = torch.randn(3, 5, device=device, requires_grad=True), torch.randn(4, 5, device=device)

    def everything(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values, indices = similarity_topk(x, y, 2, backend=backend)
        agreeing = agreement_topk(x, y[:3], 2, backend=backend)
        return values, indices, *agreeing, retrieval_ranks(x, y, backend=backend)

    eager = everything(x, y)
    assert not any(result.requires_grad for result in eager)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(x, y)
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other)


X, Y, IDS = torch.ones(3, 2), torch.ones(4, 2), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: similarity_topk(X, Y, 5),
            ValueError,
            "similarity_topk: k must be at least 1 and at most 4, got 5",
        ),
        (lambda: similarity_topk(X, Y, 0), ValueError, "k must be at least 1"),
        (lambda: similarity_topk(X, Y, 1.0), TypeError, "k must be an int, got float 1.0"),
        (lambda: similarity_topk(X, Y, True), TypeError, "k must be an int, got bool True"),
        (
            lambda: similarity_topk(X, Y[:, :1], 1),
            ValueError,
            r"y must have shape \[N, D\] with D = 2, got \[4, 1\]",
        ),
        (
            lambda: similarity_topk(X, Y.double(), 1),
            TypeError,
            "y must be torch.float32 like x, got torch.float64",
        ),
        (lambda: similarity_topk(X.int(), Y, 1), TypeError, "x must be float32, .*, got torch.int32"),
        (lambda: similarity_topk(X, Y, 1, metric="l2"), ValueError, "metric must be one of"),
        (
            lambda: similarity_topk(X, Y, 1, exclude=IDS),
            ValueError,
            "exclude as one tensor needs as many rows",
        ),
        (lambda: similarity_topk(X, Y, 1, exclude=3), TypeError, "exclude must be int64 ids or a pair"),
        (
            lambda: similarity_topk(X, Y, 1, exclude=(IDS, IDS)),
            ValueError,
            r"exclude\[1\] must have shape \[4\], got \[3\]",
        ),
        (
            lambda: similarity_topk(X, Y, 1, exclude=(IDS.int(), IDS)),
            TypeError,
            r"exclude\[0\] must be int64",
        ),
        (lambda: similarity_topk(X, Y, 1, backend="gpu"), ValueError, "backend must be 'auto' or one of"),
        (
            lambda: similarity_topk(X, Y, 1, backend="cuda"),
            NotImplementedError,
            "backend 'cuda' takes CUDA tensors",
        ),
        (lambda: agreement_topk(X, Y, 1), ValueError, r"b must have shape \[N, E\] with N = 3, got \[4, 2\]"),
        (
            lambda: agreement_topk(X, X, 4),
            ValueError,
            "agreement_topk: k must be at least 1 and at most 3, got 4",
        ),
        (
            lambda: agreement_topk(X, X, 1, combine="mean"),
            ValueError,
            r"combine must be one of \['min', 'max'\]",
        ),
        (
            lambda: agreement_topk(X, X.half(), 1),
            TypeError,
            "b must be torch.float32 like a, got torch.float16",
        ),
        (lambda: retrieval_ranks(X, Y[0]), ValueError, r"retrieval_ranks: y must have shape \[N, D\]"),
        (lambda: retrieval_ranks(X, Y, positives=IDS + 2), ValueError, r"row indices of y in \[0, 4\)"),
        (
            lambda: retrieval_ranks(X, Y, positives=(IDS, IDS)),
            ValueError,
            r"positives\[1\] must have shape \[4\]",
        ),
        (lambda: retrieval_ranks(X, Y, positives="all"), TypeError, "positives must be None"),
        (lambda: retrieval_ranks([1], Y), TypeError, "x must be a tensor, got list"),
    ],
)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
