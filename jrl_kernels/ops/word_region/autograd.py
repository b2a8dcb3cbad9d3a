"""torch.ops.jrl.word_region_forward and its backward: schema, fake implementation, and the glue to a backend.

The operator returns how well the context of every query fits it; pooling and scales are ordinary differentiable PyTorch around
it. Saved for the backward: inputs and three numbers a query of a pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import accumulation
from ..._operators import register
from .backends import BACKENDS
from .packing import gathered, spread, spread_rows
from .sweep import EPS, Numbers, Problem, Wanted, gradients


def _problem(
    keys: Tensor,
    queries: Tensor,
    key_values: Tensor | None,
    query_values: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attention_scale: Tensor,
    prenormalize: str,
    hard: bool,
    match: str,
    backend: str,
) -> tuple[Any, Problem]:
    """The backend's module and the operands prepared for it, without padded queries where it leaves them out."""
    implementation: Any = BACKENDS[backend].load()
    prepare = implementation.prepare
    problem = Problem(
        prepare(keys),
        prepare(queries),
        None if key_values is None else prepare(key_values),
        None if query_values is None else prepare(query_values),
        None if key_mask is None else key_mask.contiguous(),
        None if query_mask is None else query_mask.contiguous(),
        attention_scale,
        prenormalize,
        hard,
        match == "cosine",
    )
    return implementation, implementation.pack(problem) if hasattr(implementation, "pack") else problem


def _inverse_lengths(queries: Tensor, query_values: Tensor | None) -> Tensor:
    """[C, T], what a cosine multiplies by on the queries' side; 0 for one that is too short to have a direction."""
    compared = queries if query_values is None else query_values
    norm = torch.linalg.vector_norm(compared, dim=-1, dtype=accumulation(compared.dtype))
    return torch.where(norm <= EPS, 0.0, 1 / norm)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys, queries, scale = arguments[0], arguments[1], arguments[6]
    shape = (keys.shape[0], *queries.shape[:2])
    if 0 in shape:
        nothing = [scale.new_empty(shape) for _ in range(4)]
        return nothing[0], nothing[1], nothing[2], nothing[3]
    implementation, problem = _problem(*arguments)
    match, log_sum_exp, norm = implementation.forward(problem)
    if problem.offsets is not None:
        match = spread(match, problem.query_mask, shape, 0.0)
        log_sum_exp = spread(log_sum_exp, problem.query_mask, shape, 0.0)
        norm = spread(norm, problem.query_mask, shape, 1.0)
    result = match * _inverse_lengths(queries, arguments[3]) if problem.cosine else match.clone()
    return result, log_sum_exp, norm, match


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    *inputs, log_sum_exp, norm, match, wanted = arguments[:-4]
    implementation, problem = _problem(*inputs, *arguments[-4:])
    queries, query_values, mask = inputs[1], inputs[3], problem.query_mask
    inverse = _inverse_lengths(queries, query_values) if problem.cosine else None
    if inverse is not None:
        grad = grad * inverse
    packed = problem.offsets is not None
    numbers = [gathered(t, mask) if packed else t.contiguous() for t in (grad, match, log_sum_exp, norm)]
    found = gradients(problem, implementation, Numbers(*numbers), Wanted(*wanted))
    if packed:
        found = found._replace(
            queries=spread_rows(found.queries, mask, queries),
            query_values=spread_rows(found.query_values, mask, query_values),
        )
    if inverse is not None:
        # Here and not in PyTorch around the operator: what it takes away along a query is nearly all that the operator gave,
        # and must meet it before either is rounded to the inputs' dtype.
        along = ((grad * match).sum(0) * inverse**2).unsqueeze(-1)
        total, compared = (
            (found.queries, queries) if query_values is None else (found.query_values, query_values)
        )
        if total is not None:
            total.sub_(along * compared)
    return found


def _forward_fake(keys: Tensor, queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = keys.new_empty(keys.shape[0], *queries.shape[:2], dtype=accumulation(keys.dtype))
    return like, torch.empty_like(like), torch.empty_like(like), torch.empty_like(like)


register(
    "word_region",
    inputs="Tensor keys, Tensor queries, Tensor? key_values, Tensor? query_values, Tensor? key_mask, Tensor? query_mask, "
    "Tensor attention_scale",
    options="str prenormalize, bool hard, str match, str backend",
    outputs=("match", "log_sum_exp", "norm", "agreement"),
    gradients=("keys", "queries", "key_values", "query_values", "attention_scale"),
    forward=_forward,
    fake=_forward_fake,
    backward=_backward,
)
