"""The softmax of `info_nce` in pieces, for losses of other libraries whose denominators it does not spell itself."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import _checks, info_nce

PAIRS_AT_A_TIME = 1 << 16


def same_rows(op: str, x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """ValueError where two sides of pairs differ in their number of rows: `info_nce` would take the rest for negatives."""
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{op}: {x_name} and {y_name} must have the same number of rows, got {x.shape[0]} and {y.shape[0]}"
        )


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Products x_i . y_i of rows, [M], in float32 or wider."""
    wide = _checks.accumulation(x.dtype)
    return (x.to(wide) * y.to(wide)).sum(-1)


def pair_dots(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Products x_i . y_j of listed pairs; what is gathered exists a slice at a time, in the backward too."""

    def dots(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return row_dots(x[i], y[j])

    if rows.numel() <= PAIRS_AT_A_TIME:
        return dots(x, y, rows, columns)
    slices = zip(rows.split(PAIRS_AT_A_TIME), columns.split(PAIRS_AT_A_TIME), strict=True)
    return torch.cat([checkpoint(dots, x, y, i, j, use_reentrant=False) for i, j in slices])


def log_sum_exp(
    x: Tensor,
    keys: Tensor,
    member: Tensor,
    *,
    scale: float | Tensor,
    exclude: tuple[Tensor, Tensor] | None = None,
    member_dots: Tensor | None = None,
) -> Tensor:
    """log of the sum over keys j, those with an id of the row's left out, of exp(scale * x_i . keys_j): [M].

    `info_nce` returns this less the logit of a positive, for which any key that is not left out will do: `member` [M] names it,
    and its logit is added again. `member_dots` [M]: its product, where the caller has it.
    """
    loss: Tensor = info_nce(
        x, keys, scale=scale, positives=member, exclude=exclude, direction="x_to_y", reduction="none"
    )
    dots = row_dots(x, keys[member]) if member_dots is None else member_dots
    return loss + scale * dots


def common_dtype(*tensors: Tensor) -> list[Tensor]:
    """Under autocast in its dtype, as the products of a host would be; otherwise in the widest of their own."""
    cast = [tensor for tensor in _checks.autocast(*tensors) if tensor is not None]
    widest = functools.reduce(torch.promote_types, [tensor.dtype for tensor in cast])
    return [tensor.to(widest) for tensor in cast]
