"""sigmoid_contrastive: SigLIP's pairwise loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks, _dispatch, _operators
from ..._positives import Positives, group, parse
from ..._sweep import Source, Wanted, gradients
from . import reference
from .backends import BACKENDS


def sigmoid_contrastive(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    positives: Any = None,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The sigmoid loss for image-text pairs, without the matrix of logits.

    With s_ij = scale * x_i . y_j + bias and z_ij = 1 for a positive pair, -1 otherwise::

        loss = -(1/M) sum_i sum_j log sigmoid(z_ij s_ij)

    Source: Zhai et al. 2023 (SigLIP).

    Args:
        x: [M, D], float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        y: [N, D], like x.
        scale: inverse temperature, a number or a 0-d tensor (with gradient).
        bias: added to every logit, a number or a 0-d tensor (with gradient); SigLIP starts at -10.
        positives: as in `info_nce`: None (row i with row i), an index per row, a pair of ids, or a sparse CSR boolean matrix.
        normalize: divide the rows of x and y by their Euclidean norm first.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A 0-d float32 (float64) loss.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: x, y, scale, bias; once differentiable, twice with backend="reference".
    """
    op = "sigmoid_contrastive"
    _checks.matrix(op, "x", x)
    _checks.matrix(op, "y", y, columns=x.shape[1])
    _checks.same_device(op, "y", y, "x", x)
    x, y = _checks.autocast(x, y)  # type: ignore[assignment]
    _checks.same_dtype(op, "y", y, "x", x)
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    factor, offset = _checks.scalar(op, "scale", scale, "x", x), _checks.scalar(op, "bias", bias, "x", x)
    which = parse(op, positives, x.shape[0], y.shape[0], x)
    name = _dispatch.select(op, backend, "info_nce", x)
    if name == "reference":
        losses = reference.sigmoid_contrastive(reference.logits(x, y, None, factor, offset), which)
    else:
        losses = torch.ops.jrl.sigmoid_contrastive_forward(x, y, factor, offset, *which, name)[0]
    return losses.sum() / max(x.shape[0], 1)


def _problem(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *rest: Any) -> tuple[Any, Source, Positives]:
    *lists, backend = rest
    implementation: Any = BACKENDS[backend].load()
    source = Source(implementation.prepare(x), implementation.prepare(y), None, scale, bias)
    return implementation, source, Positives(*(None if t is None else t.contiguous() for t in lists))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    implementation, source, positives = _problem(*arguments)
    sums, pair_logits = implementation.sigmoid_sums(source, positives)
    if pair_logits is None:
        return sums, sums.new_empty(0)
    # softplus(-s) - softplus(s) = -s turns the sweep's negative term of a listed pair into its positive one.
    assert positives.rows is not None
    # By segments in a fixed order: index_add on a GPU would add a row's pairs in any.
    return sums - group(positives.rows, sums.shape[0], in_order=True).reduce(pair_logits, "sum"), pair_logits


def backward(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """The operator's backward before gradients are cast to their inputs' dtype, for those who add up parts of them."""
    *inputs, pair_logits, flags, backend = arguments
    implementation, source, positives = _problem(*inputs, backend)
    listed = None if positives.rows is None else pair_logits
    tile, block = implementation.sigmoid_gradient(source, positives, grad.contiguous(), listed)
    found = gradients(source, tile, block, Wanted(flags[0], flags[1], False, flags[2]), bias=flags[3])

    return found.x, found.y, found.scale, found.bias


def _forward_fake(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    losses = x.new_empty(x.shape[0], dtype=_checks.accumulation(x.dtype))
    return losses, losses.new_empty(0 if rest[2] is None else rest[2].shape[0])


_operators.register(
    "sigmoid_contrastive",
    inputs="Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor? x_ids, Tensor? y_ids, Tensor? pair_rows, Tensor? pair_columns",
    options="str backend",
    outputs=("losses", "pair_logits"),
    gradients=("x", "y", "scale", "bias"),
    forward=_forward,
    fake=_forward_fake,
    backward=backward,
)
