"""Every query of every caption against every image: what a backend computes of it, and the products of its backward.

For image b with keys k_r and values v_r, caption c with queries q_t and values w_t (the keys and queries themselves unless values
are given), over the valid keys r::

    a_tr = q_t . k_r      z = attention_scale * pre(a)      alpha_t = softmax_r z_tr, or one-hot of the arg-max (lowest index)
    u_tr = w_t . v_r  (u = a without values)                n_t = sum_r alpha_tr u_tr
    match_t = n_t, or with `cosine` n_t / norm_t            norm_t = max(|sum_r alpha_tr v_r|, EPS)

`pre` normalises over the valid queries t of a caption for each key r. A query that is not valid, and every query of an image
without valid keys, has match 0 and no gradient. A NaN among the z of a query's valid keys reaches its match, `hard` or not.

A backend is a module of:

    prepare(tensor) -> Tensor
        a matrix operand as its kernels take it, contiguous; the products below multiply prepared operands with tiles.
    forward(problem) -> (match, log_sum_exp, norm)
        each [B, C, T] in the accumulation dtype: log_sum_exp of z over the valid keys (the maximum of z if `hard`), norm as above
        (1 without `cosine`). Where a query or every key is not valid, these two are finite and otherwise unspecified.
    block(problem) -> (images, captions)
        how many of them a tile of the backward takes.
    gradient_tile(problem, grad, match, log_sum_exp, norm, b0, b1, c0, c1) -> Tile
        of images b0:b1 and captions c0:c1, from grad = dL/dmatch and what `forward` gave, all [B, C, T].

A backend may have pack(problem) -> Problem too, which leaves queries that are not valid out; see `Problem.offsets`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._sweep import accumulate

EPS = 1e-8
"""The least norm that a cosine divides by."""


class Problem(NamedTuple):
    """One call's operands. Without values of their own, keys and queries are the values ("shared")."""

    keys: Tensor  # [B, R, D]
    queries: Tensor  # [C, T, D]
    key_values: Tensor | None  # [B, R, E]; None together with query_values
    query_values: Tensor | None  # [C, T, E]
    key_mask: Tensor | None  # bool [B, R], True = valid
    query_mask: Tensor | None  # bool [C, T]
    attention_scale: Tensor  # 0-d, in the accumulation dtype
    prenormalize: str
    hard: bool
    cosine: bool
    offsets: tuple[int, ...] | None = None
    """Of a packed problem: queries are [N, D] (their values [N, E], what the forward gave [B, N]) and those of caption c are
    the rows offsets[c]:offsets[c + 1]."""

    @property
    def values(self) -> Tensor:
        return self.keys if self.key_values is None else self.key_values

    @property
    def captions(self) -> int:
        return self.queries.shape[0] if self.offsets is None else len(self.offsets) - 1

    def rows(self, c0: int, c1: int) -> tuple[int, int]:
        """Where the queries of captions c0:c1 lie in the flattened queries."""
        if self.offsets is not None:
            return self.offsets[c0], self.offsets[c1]
        return c0 * self.queries.shape[1], c1 * self.queries.shape[1]


class Tile(NamedTuple):
    """Gradients within images b0:b1 and captions c0:c1, for `rows` = (c1 - c0) T flattened queries (fewer if packed).

    The matrices are contiguous [rows, b1 - b0, R], so that one product serves all images of the tile; they may be buffers that
    the next call reuses, in the dtype of the prepared operands so that a GPU's matrix units take them as they are. All but
    `alpha` and `dscale` are in units of `unit` where that is given: a 0-d tensor, the same for every tile of a call. Entries of
    keys or queries that are not valid are 0.
    """

    da: Tensor  # dL/da; without values of its own that includes what comes through u = a
    du: Tensor | None  # dL/du = dL/dn alpha; None without values
    alpha: Tensor | None  # the attention; None unless cosine
    weighted: (
        Tensor | None
    )  # alpha * dL/d(norm^2), that is -grad match / (2 norm^2) alpha; None unless cosine
    dscale: Tensor  # dL/dattention_scale of the tile, or parts of it that are summed here
    unit: Tensor | None = None


class Numbers(NamedTuple):
    """dL/dmatch and what the forward gave, of every query of every pair: [B, C, T], or [B, N] packed."""

    grad: Tensor
    match: Tensor
    log_sum_exp: Tensor
    norm: Tensor


class Wanted(NamedTuple):
    """Which gradients the caller asks for."""

    keys: bool
    queries: bool
    key_values: bool
    query_values: bool
    attention_scale: bool


class Gradients(NamedTuple):
    """In the accumulation dtype; queries and their values in the shape of the problem's. None where not wanted."""

    keys: Tensor | None
    queries: Tensor | None
    key_values: Tensor | None
    query_values: Tensor | None
    attention_scale: Tensor | None


def gradients(problem: Problem, implementation: Any, numbers: Numbers, wanted: Wanted) -> Gradients:
    """Every gradient, in one sweep over the tiles of `implementation`, in a fixed order: the same bits every run.

    dkeys = da^T queries, dqueries = da keys; the same with du for the values; and where the norm counts, the values' gradient
    receives 2 sum_t dL/d(norm_t^2) alpha_t alpha_t^T values, as a sum of the R x R matrices or, where that is less work, through
    the contexts of the tile.
    """
    images, regions = problem.keys.shape[:2]
    shared = problem.key_values is None
    like = problem.attention_scale  # in the accumulation dtype
    flat = problem._replace(
        keys=problem.keys.flatten(0, 1),
        queries=problem.queries.flatten(0, -2),
        key_values=None if problem.key_values is None else problem.key_values.flatten(0, 1),
        query_values=None if problem.query_values is None else problem.query_values.flatten(0, -2),
    )

    def zeros(wanted: bool, operand: Tensor | None) -> Tensor | None:
        return like.new_zeros(operand.shape) if wanted and operand is not None else None

    dkeys, dqueries = zeros(wanted.keys, flat.keys), zeros(wanted.queries, flat.queries)
    dkey_values = zeros(wanted.key_values, flat.key_values)
    dquery_values = zeros(wanted.query_values, flat.query_values)
    dscale = like.new_zeros(()) if wanted.attention_scale else None
    dvalues = dkeys if shared else dkey_values
    unit = None
    block = implementation.block(problem)
    for b0 in range(0, images, block[0]):
        b1 = min(b0 + block[0], images)
        columns = slice(b0 * regions, b1 * regions)
        norms = _NormGradient(problem, b0, b1) if problem.cosine and dvalues is not None else None
        for c0 in range(0, problem.captions, block[1]):
            c1 = min(c0 + block[1], problem.captions)
            rows = slice(*problem.rows(c0, c1))
            if rows.start == rows.stop:
                continue
            tile = implementation.gradient_tile(problem, *numbers, b0, b1, c0, c1)
            _multiply(tile.da, flat.keys, flat.queries, dkeys, dqueries, rows, columns)
            if tile.du is not None and flat.key_values is not None and flat.query_values is not None:
                values = flat.key_values, flat.query_values
                _multiply(tile.du, *values, dkey_values, dquery_values, rows, columns)
            if norms is not None and tile.alpha is not None and tile.weighted is not None:
                norms.add(tile.alpha, tile.weighted)
            if dscale is not None:
                dscale += tile.dscale.sum()
            unit = tile.unit
        if norms is not None and dvalues is not None:
            dvalues[columns] += norms.finish().flatten(0, 1)
    found = (dkeys, dqueries, dkey_values, dquery_values)
    operands = (problem.keys, problem.queries, problem.key_values, problem.query_values)
    shaped: list[Tensor | None] = []
    for total, operand in zip(found, operands, strict=True):
        if total is not None and unit is not None:
            total *= unit
        shaped.append(None if total is None or operand is None else total.view(operand.shape))
    return Gradients(shaped[0], shaped[1], shaped[2], shaped[3], dscale)


def _multiply(
    tile: Tensor,
    keys: Tensor,
    queries: Tensor,
    dkeys: Tensor | None,
    dqueries: Tensor | None,
    rows: slice,
    columns: slice,
) -> None:
    """dqueries[rows] += tile keys[columns], dkeys[columns] += tile^T queries[rows]."""
    tile = tile.flatten(1)
    if dqueries is not None:
        accumulate(dqueries[rows], tile, keys[columns])
    if dkeys is not None:
        accumulate(dkeys[columns], tile.T, queries[rows])


def sums_matrices(queries: int, regions: int, width: int) -> bool:
    """Whether the norms' gradient of an image costs less as R x R matrices than through the contexts of its queries."""
    return regions * (queries + width) <= 2 * queries * width


class _NormGradient:
    """Sums 2 sum_t dL/d(norm_t^2) alpha_t (alpha_t^T V) over the tiles of images b0:b1."""

    def __init__(self, problem: Problem, b0: int, b1: int) -> None:
        self.values = problem.values[b0:b1]
        images, regions, width = self.values.shape
        self.by_matrix = sums_matrices(problem.rows(0, problem.captions)[1], regions, width)
        self.sum = problem.attention_scale.new_zeros(images, regions, regions if self.by_matrix else width)

    def add(self, alpha: Tensor, weighted: Tensor) -> None:
        alpha, weighted = alpha.transpose(0, 1), weighted.permute(1, 2, 0)
        if self.by_matrix:
            _accumulate_batched(self.sum, weighted, alpha)
        else:
            _accumulate_batched(self.sum, weighted, torch.bmm(alpha.to(self.values.dtype), self.values))

    def finish(self) -> Tensor:
        if not self.by_matrix:
            return 2 * self.sum
        return 2 * torch.bmm(self.sum, self.values.to(self.sum.dtype))


def _accumulate_batched(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b over batches, accumulated in the dtype of `out`."""
    if a.is_cuda and a.dtype == b.dtype != out.dtype:
        out += torch.bmm(a, b, out_dtype=out.dtype)
    else:
        out.baddbmm_(a.to(out.dtype), b.to(out.dtype))
