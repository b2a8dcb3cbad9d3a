"""Queries without padding: the rows that are valid, caption after caption, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .sweep import Problem


def packed(problem: Problem) -> Problem:
    """The problem with valid queries alone; reads the mask's values, so for CPU tensors only."""
    captions, words = problem.queries.shape[:2]
    mask = problem.query_mask
    counts = [words] * captions if mask is None else mask.sum(1).tolist()
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    values = problem.query_values
    return problem._replace(
        queries=_rows(problem.queries, mask),
        query_values=None if values is None else _rows(values, mask),
        offsets=tuple(offsets),
    )


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor.flatten(0, 1) if mask is None else tensor[mask]


def gathered(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """[B, C, T] -> [B, N], the valid queries."""
    return (tensor.flatten(1) if mask is None else tensor[:, mask]).contiguous()


def spread(tensor: Tensor, mask: Tensor | None, shape: torch.Size | tuple[int, ...], fill: float) -> Tensor:
    """[B, N] -> [B, C, T], `fill` at queries that are not valid."""
    if mask is None:
        return tensor.view(shape)
    result = tensor.new_full(tuple(shape), fill)
    result[:, mask] = tensor
    return result


def spread_rows(rows: Tensor | None, mask: Tensor | None, like: Tensor | None) -> Tensor | None:
    """[N, D] -> the shape of `like` [C, T, D], 0 at queries that are not valid."""
    if rows is None or like is None:
        return None
    if mask is None:
        return rows.view(like.shape)
    result = rows.new_zeros(like.shape)
    result[mask] = rows
    return result
