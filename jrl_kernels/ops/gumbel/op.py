"""gumbel_assign: tokens to groups, one-hot forward and soft backward, and the mean of each group's values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _checks, _dispatch, _operators
from . import reference, seeds
from .backends import BACKENDS as BACKENDS


class Assignment(NamedTuple):
    """What `gumbel_assign` returns."""

    pooled: Tensor  # [B, G, E], the mean of the values of each group
    index: Tensor  # type: ignore[assignment]  # int64 [B, S], the group of each token; -1 where masked
    soft: Tensor | None  # [B, G, S], softmax over groups of the noise-free logits, detached


def gumbel_assign(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    tau: float = 1.0,
    scale: float | Tensor | None = None,
    hard: bool = True,
    noise: bool = True,
    seed: int | Tensor | None = None,
    eps: float = 0.0,
    key_mask: Tensor | None = None,
    return_soft: bool = False,
    backend: str = "auto",
) -> Assignment:
    """Assign each token to one group and average the groups: GroupViT's AssignAttention without the assignment matrix.

    With logits l_gs = scale * q_g . k_s and Gumbel noise n_gs, all over the groups of one token::

        A_gs = softmax_g((l_gs + n_gs) / tau)
        Â_gs = 1[g = argmax_g (l_gs + n_gs)]   (hard; its gradient is A's: straight-through)   or   A_gs
        pooled_g = sum_s Â_gs v_s / (sum_s Â_gs + eps)

    The normaliser is differentiated too. A group whose normaliser is zero yields zeros and passes no gradient. Sources: Xu et al.
    2022 (GroupViT: eps=1 in its code, 0 in its patent); Jang et al. 2017. Unlike theirs, the noise is a function of the seed and
    the element (Philox4x32-10): the backward draws it again, and every backend draws the same.

    Args:
        queries: [B, G, D], the groups; float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        keys: [B, S, D], the tokens, like queries.
        values: [B, S, E], what is averaged, like queries.
        tau: temperature of the softmax, greater than 0.
        scale: of the logits, a number or a 0-d tensor (with gradient); None for D ** -0.5.
        hard: one-hot forward and soft backward; False for the soft assignment in both.
        noise: draw it; False for evaluation.
        seed: of the noise: an int in [0, 2**63), an int64 tensor of one element on the device of queries which the host
            never reads, or None to draw one from PyTorch's generator. Nothing is drawn without noise.
        eps: added to the normaliser, at least 0.
        key_mask: bool [B, S], True for tokens that count; the others take part in nothing and have index -1.
        return_soft: also return softmax_g(l_gs), without noise and tau, as GroupViT draws it; float32 (float64), no gradient.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        Assignment(pooled [B, G, E] in the dtype of values, index int64 [B, S] (lowest among ties), soft [B, G, S] or None).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: queries, keys, values, scale; once differentiable, twice with backend="reference".
    """
    op = "gumbel_assign"
    sizes: dict[str, int] = {}
    for name, tensor, letters in (
        ("queries", queries, "B G D"),
        ("keys", keys, "B S D"),
        ("values", values, "B S E"),
    ):
        _checks.shaped(op, name, tensor, letters, sizes)
        _checks.same_device(op, name, tensor, "queries", queries)
    if sizes["G"] == 0 or sizes["D"] == 0:
        raise ValueError(f"{op}: queries must have a group and a width, got shape {list(queries.shape)}")
    queries, keys, values = _checks.autocast(queries, keys, values)  # type: ignore[assignment]
    _checks.same_dtype(op, "keys", keys, "queries", queries)
    _checks.same_dtype(op, "values", values, "queries", queries)
    tau = _checks.number(op, "tau", tau, above=0.0)
    eps = _checks.number(op, "eps", eps, minimum=0.0)
    factor = _checks.scalar(op, "scale", sizes["D"] ** -0.5 if scale is None else scale, "queries", queries)
    drawn = seeds.parse(op, noise, seed, "queries", queries)
    name = _dispatch.select(op, backend, "gumbel", queries)
    if key_mask is not None:
        _checks.mask(op, "key_mask", key_mask, "B S", sizes, "queries", queries)
        # Whatever a masked token holds, NaN included, meets a zero in some product.
        unmasked = key_mask[:, :, None]
        keys, values = torch.where(unmasked, keys, 0.0), torch.where(unmasked, values, 0.0)
    operands = (queries, keys, values, factor, drawn, key_mask)
    if name == "reference":
        pooled, index = reference.gumbel_assign(*operands, tau, eps, bool(hard))
    else:
        pooled, index, *_ = torch.ops.jrl.gumbel_assign_forward(*operands, tau, eps, bool(hard), name)
    soft = None
    if return_soft:
        soft = reference.soft_assignment(queries.detach(), keys.detach(), factor.detach(), key_mask)
    return Assignment(pooled, index, soft)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, tau, eps, hard, backend = arguments
    implementation: Any = BACKENDS[backend].load()
    return tuple(implementation.assign_forward(*operands, tau, eps, hard))


def _fake(queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (images, groups, _), (_, tokens, width) = queries.shape, values.shape
    wide = _checks.accumulation(queries.dtype)
    return (
        values.new_empty(images, groups, width),
        keys.new_empty(images, tokens, dtype=torch.int64),
        keys.new_empty(images, tokens, dtype=wide),
        values.new_empty(images, groups, dtype=wide),
        values.new_empty(images, groups, width, dtype=wide),
    )


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    *tensors, wanted, tau, eps, hard, backend = arguments
    implementation: Any = BACKENDS[backend].load()
    return tuple(implementation.assign_backward(grad, *tensors, wanted, tau, eps, hard))


# Besides the result: each token's log-sum-exp of (l + n) / tau, each group's normaliser less eps, and the means unrounded.
_operators.register(
    "gumbel_assign",
    inputs="Tensor queries, Tensor keys, Tensor values, Tensor scale, Tensor? seed, Tensor? key_mask",
    options="float tau, float eps, bool hard, str backend",
    outputs=("pooled", "index", "log_sum_exp", "share", "means"),
    gradients=("queries", "keys", "values", "scale"),
    forward=_forward,
    fake=_fake,
    backward=_backward,
)
