"""partition_nce: AVID's noise-contrastive estimation over a memory bank; noise_log_partition: its frozen constant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _checks, _dispatch
from . import autograd, reference  # noqa: F401  (autograd registers torch.ops.jrl.partition_nce_*)
from .backends import BACKENDS as BACKENDS

GATHERED_ELEMENTS = 1 << 23


def partition_nce(
    query: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    *,
    scale: float | Tensor,
    log_partition: float | Tensor,
    positive_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Noise-contrastive estimation of instances in a memory bank, without the gathered rows.

    With s_bj = scale * query_b . bank[index_bj] and c = log Q + log_partition::

        loss_b = mean over positives of softplus(c - s)  +  sum over the Q negatives of softplus(s - c)

    and the mean of loss_b over the rows that have a positive. exp(c) = Q Z is the mass that Q noise samples would have: a pair
    is a positive with probability exp(s) / (exp(s) + Q Z).

    Source: Morgado et al. 2021 (AVID, one positive; AVID-CMA, K of them), after Wu et al. 2018. The official code divides by the
    batch size, which is the same where every row has a positive.

    Args:
        query: [B, D], float32, bfloat16 or float16 (float64 on "reference" and "cpu"); under autocast it takes the bank's dtype,
            since casting the bank would copy it.
        bank: [N, D], like query, without gradient.
        positive_index: int64 [B, K], rows of the bank, K at least 1. An index may repeat, here and in negative_index.
        negative_index: int64 [B, Q], Q at least 1.
        scale: inverse temperature, a number or a 0-d tensor (with gradient).
        log_partition: log Z, a number or a 0-d tensor without gradient; `noise_log_partition` estimates it.
        positive_mask: boolean [B, K], True where a positive counts. What a masked index holds does not matter; a row without a
            positive contributes exactly nothing.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A 0-d float32 (float64) loss; 0 where no row has a positive.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value; bank or log_partition requires grad.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: query, scale; once differentiable, twice with backend="reference".
    """
    op = "partition_nce"
    sizes: dict[str, int] = {}
    query, bank = _operands(op, query, bank, sizes)
    _checks.tensor(op, "positive_index", positive_index)
    if positive_mask is not None:
        _checks.mask(op, "positive_mask", positive_mask, "B K", sizes, "query", query)
        if positive_mask.shape == positive_index.shape and positive_mask.device == positive_index.device:
            positive_index = torch.where(positive_mask, positive_index, 0)
    limit = sizes["N"]
    _checks.indices(op, "positive_index", positive_index, "B K", sizes, limit, "query", query)
    _checks.indices(op, "negative_index", negative_index, "B Q", sizes, limit, "query", query)
    for name, letter in (("positive_index", "K"), ("negative_index", "Q")):
        if sizes[letter] == 0:
            raise ValueError(f"{op}: {name} must have at least one column, got {[sizes['B'], 0]}")
    factor = _checks.scalar(op, "scale", scale, "query", query)
    if isinstance(log_partition, Tensor) and log_partition.requires_grad:
        raise ValueError(f"{op}: log_partition is a constant and must not require grad")
    constant = _checks.scalar(op, "log_partition", log_partition, "query", query) + math.log(sizes["Q"])
    counted: Any = sizes["B"]
    if positive_mask is not None:
        some = positive_mask.any(1)
        counted = some.sum()
        # A product with a NaN that does not count would be NaN.
        query = torch.where(some[:, None], query, 0.0)
    name = _dispatch.select(op, backend, "partition_nce", query)
    inputs = query, bank, positive_index, negative_index, positive_mask, factor, constant
    if name == "reference":
        losses = reference.partition_nce(*inputs)
    else:
        wanted = torch.is_grad_enabled() and (query.requires_grad or factor.requires_grad)
        losses = torch.ops.jrl.partition_nce_forward(*inputs, wanted, name)[0]
    return losses.sum() / (counted.clamp(min=1) if isinstance(counted, Tensor) else max(counted, 1))


def noise_log_partition(
    query: Tensor, bank: Tensor, negative_index: Tensor, *, scale: float | Tensor
) -> Tensor:
    """log Z with Z the mean of exp(s) over all negatives: AVID takes it from its first batch and keeps it.

    With s_bj = scale * query_b . bank[index_bj]::

        log_partition = LSE over all b, j of s  -  log(B Q)

    Source: Morgado et al. 2021 (its code's first call). Gathers a bounded number of rows at a time, on any device.

    Args:
        query: [B, D], float32, bfloat16, float16 or float64.
        bank: [N, D], like query.
        negative_index: int64 [B, Q], rows of the bank; at least one index.
        scale: inverse temperature, a number or a 0-d tensor.

    Returns:
        A 0-d float32 (float64) tensor without gradient.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.

    Gradients: none.
    """
    op = "noise_log_partition"
    sizes: dict[str, int] = {}
    query, bank = _operands(op, query, bank, sizes)
    _checks.indices(op, "negative_index", negative_index, "B Q", sizes, sizes["N"], "query", query)
    if negative_index.numel() == 0:
        raise ValueError(
            f"{op}: negative_index must hold at least one index, got {list(negative_index.shape)}"
        )
    factor = _checks.scalar(op, "scale", scale, "query", query)
    with torch.no_grad():
        parts = [
            reference.scores(query[rows], bank, negative_index[rows, columns], factor).logsumexp((0, 1))
            for rows, columns in _chunks(sizes["B"], sizes["Q"], sizes["D"])
        ]
        return torch.stack(parts).logsumexp(0) - math.log(negative_index.numel())


def _operands(op: str, query: Tensor, bank: Tensor, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    _checks.shaped(op, "query", query, "B D", sizes)
    _checks.shaped(op, "bank", bank, "N D", sizes)
    _checks.same_device(op, "bank", bank, "query", query)
    if bank.requires_grad:
        raise ValueError(f"{op}: bank has no gradient and must not require one; pass bank.detach()")
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(bank.dtype)
    _checks.same_dtype(op, "bank", bank, "query", query)
    return query, bank


def _chunks(rows: int, columns: int, depth: int) -> Iterator[tuple[slice, slice]]:
    width = min(columns, max(1, GATHERED_ELEMENTS // max(depth, 1)))
    height = max(1, GATHERED_ELEMENTS // (width * max(depth, 1)))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, top + height), slice(left, left + width)
