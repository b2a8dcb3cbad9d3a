"""similarity_topk, retrieval_ranks and agreement_topk: what can be read off a matrix of scores without storing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, _dispatch
from ..._operators import LIBRARY
from ..._positives import Positives, parse
from . import reference, search
from .backends import BACKENDS as BACKENDS
from .matrix import METRICS


def similarity_topk(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    exclude: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k rows of y most similar to each row of x, without the matrix of similarities.

    values_i1 >= ... >= values_ik are the largest S_ij (`similarity_matrix` with scale 1) over the j that are not excluded. A
    score is the float64 sum of the given inputs, rounded to the dtype of `values`; ties go to the lowest index. So every backend
    finds the same neighbours, and equal rows of y are listed in their order.

    Args:
        x: [M, D], float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        y: [N, D], like x.
        k: from 1 to N (to 2048 on a GPU).
        metric: "cosine" (norms below 1e-12 count as 1e-12), "dot" or "order".
        exclude: int64 ids ([M], [N]), or one [M] for both sides; pairs with equal ids are left out: `exclude=arange(M)` keeps a
            row from being its own neighbour.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        values [M, k], float32 (float64 for float64), and indices [M, k], int64. Where fewer than k are left, -inf and -1. A
        score that is NaN comes first, as in torch.topk.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors, or this k, here.

    Gradients: none. Take them through `x` and `y[indices]`.
    """
    op = "similarity_topk"
    x, y = _embeddings(op, x, y)
    _checks.choice(op, "metric", metric, METRICS)
    _checks.integer(op, "k", k, 1, y.shape[0])
    excluded = _exclusions(op, exclude, x, y)
    name = _dispatch.select(op, backend, "similarity", x)
    if name == "reference":
        return _largest(reference.scores(x, y, metric), k, excluded, x.dtype)
    return torch.ops.jrl.similarity_topk(x, y, None, None, *(excluded or (None, None)), k, metric, name)


def agreement_topk(
    a: Tensor, b: Tensor, k: int, *, combine: str = "min", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k other rows that agree best with each row in two modalities: AVID-CMA's positive sets::

        rho_ij = min(a_i . a_j, b_i . b_j), j != i        combine="min": consensus of both
        rho_ij = max(a_i . a_j, b_i . b_j), j != i        combine="max": union

    Source: Morgado et al. 2021. Unlike their code, no [N, N] similarity is stored. For one modality use
    `similarity_topk(a, a, k, exclude=arange(N))`.

    Args:
        a: [N, D], of unit length for cosines; float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        b: [N, E], like a.
        k: from 1 to N (to 2048 on a GPU).
        combine: "min" or "max".
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns, Raises: as `similarity_topk`; the last of N values is always -inf, with index -1.

    Gradients: none.
    """
    op = "agreement_topk"
    sizes: dict[str, int] = {}
    _checks.shaped(op, "a", a, "N D", sizes)
    _checks.shaped(op, "b", b, "N E", sizes)
    _checks.same_device(op, "b", b, "a", a)
    a, b = _checks.autocast(a.detach(), b.detach())  # type: ignore[assignment]
    _checks.same_dtype(op, "b", b, "a", a)
    _checks.choice(op, "combine", combine, ("min", "max"))
    _checks.integer(op, "k", k, 1, a.shape[0])
    self_ids = torch.arange(a.shape[0], device=a.device)
    name = _dispatch.select(op, backend, "similarity", a)
    if name == "reference":
        both = reference.scores(a, a, "dot"), reference.scores(b, b, "dot")
        scores = torch.minimum(*both) if combine == "min" else torch.maximum(*both)
        return _largest(scores, k, (self_ids, self_ids), a.dtype)
    return torch.ops.jrl.similarity_topk(a, a, b, b, self_ids, self_ids, k, combine, name)


def retrieval_ranks(
    x: Tensor, y: Tensor, *, positives: Any = None, metric: str = "cosine", backend: str = "auto"
) -> Tensor:
    """The 0-based rank of the best-placed positive of each row of x among the rows of y, without the matrix of scores::

        rank_i = #{j not a positive of i: S_ij >= max over the positives p of S_ip}

    Ties count against the positive, its other positives do not count, so recall at k is the share of ranks below k. Scores are
    compared as float64 sums of the given inputs: rounding in the products of tiles, the backend and the batch do not change a
    rank, and equal rows of y tie. A score that is NaN counts as not below any other, on either side. A row without a positive
    has rank N, which no k counts as found.

    Args:
        x: [M, D], float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        y: [N, D], like x.
        positives: None (row i with row i); int64 [M], the row of y for each row of x; a pair of int64 ids ([M], [N]), positive
            where equal; or a sparse CSR boolean matrix [M, N].
        metric: "cosine" (norms below 1e-12 count as 1e-12), "dot" or "order".
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        int64 [M]. For the other direction swap x and y (and the pair of ids).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here.

    Gradients: none.
    """
    op = "retrieval_ranks"
    x, y = _embeddings(op, x, y)
    _checks.choice(op, "metric", metric, METRICS)
    which = parse(op, positives, x.shape[0], y.shape[0], x)
    name = _dispatch.select(op, backend, "similarity", x)
    if name == "reference":
        mask = reference.positive_mask(which, x.shape[0], y.shape[0])
        return reference.ranks(reference.scores(x, y, metric), mask)
    return torch.ops.jrl.retrieval_ranks(x, y, *which, metric, name)


def _embeddings(op: str, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    sizes: dict[str, int] = {}
    _checks.shaped(op, "x", x, "M D", sizes)
    _checks.shaped(op, "y", y, "N D", sizes)
    _checks.same_device(op, "y", y, "x", x)
    x, y = _checks.autocast(x.detach(), y.detach())
    _checks.same_dtype(op, "y", y, "x", x)
    return x, y


def _exclusions(op: str, exclude: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    if exclude is None:
        return None
    if isinstance(exclude, Tensor):
        if x.shape[0] != y.shape[0]:
            raise ValueError(
                f"{op}: exclude as one tensor needs as many rows of x as of y; pass (x_ids, y_ids), "
                f"got {x.shape[0]} and {y.shape[0]}"
            )
        exclude = (exclude, exclude)
    if not isinstance(exclude, (tuple, list)) or len(exclude) != 2:
        raise TypeError(
            f"{op}: exclude must be int64 ids or a pair (x_ids, y_ids), got {_checks.describe(exclude)}"
        )
    return (
        _checks.ids(op, "exclude[0]", exclude[0], x.shape[0], "x", x),
        _checks.ids(op, "exclude[1]", exclude[1], y.shape[0], "x", x),
    )


def _largest(
    scores: Tensor, k: int, exclude: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    excluded = None if exclude is None else exclude[0][:, None] == exclude[1][None, :]
    return reference.largest(scores.to(_checks.accumulation(dtype)), k, excluded)


def _topk(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, exclude_x: Tensor | None, exclude_y: Tensor | None,
    k: int, metric: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    passes: Any = BACKENDS[backend].load()
    pairs = search.Pairs(
        passes.prepare(x),
        passes.prepare(y),
        metric,
        None if a is None else passes.prepare(a),
        None if b is None else passes.prepare(b),
    )
    exclude = None
    if exclude_x is not None and exclude_y is not None:
        exclude = exclude_x.contiguous(), exclude_y.contiguous()
    return search.topk(pairs, k, exclude, passes)


def _topk_fake(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, exclude_x: Tensor | None, exclude_y: Tensor | None,
    k: int, metric: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = x.shape[0], k
    return x.new_empty(shape, dtype=_checks.accumulation(x.dtype)), x.new_empty(shape, dtype=torch.int64)


def _ranks(
    x: Tensor, y: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, rows: Tensor | None, columns: Tensor | None,
    metric: str, backend: str,
) -> Tensor:  # fmt: skip
    passes: Any = BACKENDS[backend].load()
    pairs = search.Pairs(passes.prepare(x), passes.prepare(y), metric)
    return search.ranks(pairs, Positives(x_ids, y_ids, rows, columns), passes)


def _ranks_fake(
    x: Tensor, y: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, rows: Tensor | None, columns: Tensor | None,
    metric: str, backend: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], dtype=torch.int64)


LIBRARY.define(
    "similarity_topk(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor? exclude_x, Tensor? exclude_y, int k, str metric, "
    "str backend) -> (Tensor values, Tensor indices)"
)
LIBRARY.define(
    "retrieval_ranks(Tensor x, Tensor y, Tensor? x_ids, Tensor? y_ids, Tensor? rows, Tensor? columns, str metric, "
    "str backend) -> Tensor"
)
for _name, _implementation, _fake in (
    ("similarity_topk", _topk, _topk_fake),
    ("retrieval_ranks", _ranks, _ranks_fake),
):
    LIBRARY.impl(_name, _checks.without_autocast(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"jrl::{_name}", _fake, lib=LIBRARY)
