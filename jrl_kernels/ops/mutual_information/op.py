"""mutual_information: InfoNCE, Jensen-Shannon and Donsker-Varadhan bounds over global or local features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, _dispatch
from . import autograd, reference  # noqa: F401  (autograd registers torch.ops.jrl.mutual_information_*)
from .backends import BACKENDS as BACKENDS

BOUNDS = ("nce", "jsd", "dv")
DIRECTIONS = ("x_to_y", "y_to_x", "both")


def mutual_information(
    x: Tensor,
    y: Tensor,
    *,
    bound: str = "nce",
    scale: float | Tensor = 1.0,
    direction: str = "x_to_y",
    own_logit: float | None = None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A lower bound, in nats, of the mutual information of two views, to be maximised (a loss is its negative).

    With u = scale * x_nl . y_n'm for every pair of images n, n' and of their locations l, m; own pairs have n = n'::

        nce    mean over own pairs of  log K - log(1 + exp(O - u)),   O = LSE of u over the M locations of every other image
        jsd    mean over own pairs of  log 2 - softplus(-u),  less the mean over all others of  softplus(u) - log 2
        dv     mean over own pairs of  u,  less  log of the mean over all others of  exp(u)

    K = 1 + the number of locations of y in other images. With one location an image, nce is I_NCE = log N - cross-entropy.

    Source: van den Oord et al. 2018 (nce), Hjelm et al. 2019 (Deep InfoMax; jsd, nce over locations), Belghazi et al. 2018 (dv).
    Deep InfoMax's code keeps the image's own locations among the candidates of nce at a logit of -10; here they are left out
    unless `own_logit` says otherwise. Its jsd and dv estimate divergences: they need not be below the mutual information itself.

    Args:
        x: [N, D], or local features [N, L, D]; float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        y: [N, D] or [N, M, D], like x; row n of both belongs to image n.
        bound: "nce", "jsd" or "dv"; jsd and dv contrast images and need two of them.
        scale: multiplies every dot product, a number or a 0-d tensor (with gradient).
        direction: which side nce contrasts: "x_to_y" gives each location of x the locations of y as candidates, "y_to_x" the
            reverse, "both" the mean of the two. jsd and dv are symmetric.
        own_logit: nce alone: a constant logit at which the M own locations join O (not K); Deep InfoMax's code has -10.
        x_mask: boolean [N, L], True where a location counts; needs local x.
        y_mask: boolean [N, M], the same for y.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A 0-d float32 (float64) bound. A mean over nothing is 0: a masked location contributes to no value and no gradient.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: x, y, scale; once differentiable, twice with backend="reference".
    """
    op = "mutual_information"
    _checks.choice(op, "bound", bound, BOUNDS)
    _checks.choice(op, "direction", direction, DIRECTIONS)
    sizes: dict[str, int] = {}
    for name, side in (("x", x), ("y", y)):
        _checks.tensor(op, name, side)
        letters = "N D" if side.dim() < 3 else "N L D" if name == "x" else "N M D"
        _checks.shaped(op, name, side, letters, sizes)
    _checks.same_device(op, "y", y, "x", x)
    if own_logit is not None:
        own_logit = _checks.number(op, "own_logit", own_logit)
        if bound != "nce":
            raise ValueError(f"{op}: own_logit must be None with bound={bound!r}, got {own_logit!r}")
    if bound != "nce" and x.shape[0] < 2:
        raise ValueError(
            f"{op}: bound={bound!r} contrasts images: x must hold at least 2, got {list(x.shape)}"
        )
    x, y = _checks.autocast(x, y)  # type: ignore[assignment]
    _checks.same_dtype(op, "y", y, "x", x)
    factor = _checks.scalar(op, "scale", scale, "x", x)
    x, x_mask = _locations(op, "x", x, x_mask, "N L", sizes)
    y, y_mask = _locations(op, "y", y, y_mask, "N M", sizes)
    name = _dispatch.select(op, backend, "mutual_information", x)
    if name == "reference":
        return reference.mutual_information(x, y, factor, x_mask, y_mask, bound, direction, own_logit)
    operator: Any = torch.ops.jrl.mutual_information_forward
    estimate: Tensor = operator(x, y, factor, x_mask, y_mask, bound, direction, own_logit, name)[0]
    return estimate


def _locations(
    op: str, name: str, side: Tensor, mask: Any, letters: str, sizes: dict[str, int]
) -> tuple[Tensor, Tensor | None]:
    """Features [N, L, D], zero where they do not count: a product with a padded NaN would be NaN."""
    if mask is not None:
        if side.dim() != 3:
            expected = f"local features {name} [{letters.replace(' ', ', ')}, D]"
            raise ValueError(f"{op}: {name}_mask needs {expected}, got {name} {list(side.shape)}")
        mask = _checks.mask(op, f"{name}_mask", mask, letters, sizes, name, side)
        side = torch.where(mask[..., None], side, 0.0)
    return (side[:, None] if side.dim() == 2 else side), mask
