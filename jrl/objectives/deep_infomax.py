"""Deep InfoMax: what the locations of a picture and the picture as a whole say about each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl_kernels import mutual_information

# expectations over own and other pairs, as the code of Deep InfoMax has them; its "x2" is not the usual variational pair
_EXPECTATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gan": (F.logsigmoid, lambda u: -F.logsigmoid(-u)),
    "x2": (torch.square, lambda u: -0.5 * (u.abs() + 1).square()),
    "kl": (lambda u: u, lambda u: (u - 1).exp()),
    "rkl": (lambda u: -(-u).exp(), lambda u: u - 1),
    "h2": (lambda u: 1 - (-u).exp(), lambda u: u.exp() - 1),
    "w1": (lambda u: u, lambda u: u),
}
MEASURES = ("nce", "jsd", "dv", *_EXPECTATIONS)
# Deep InfoMax puts a picture's own locations at this logit instead of leaving them out
_OWN_LOGIT = -10.0


def deep_infomax_loss(
    local: Tensor, global_: Tensor, measure: str = "jsd", *, backend: str = "auto"
) -> Tensor:
    """The loss of Deep InfoMax between features of N pictures.

    With u = m·l for every pair of a global feature m and a local one l, own pairs being of one picture::

        nce     mean over own pairs of −log softmax of u among itself and the locations of all pictures, those of
                its own at a logit of −10
        jsd     E_others[softplus(u) − log 2] − E_own[log 2 − softplus(−u)]
        dv      log E_others[exp u] − E_own[u]
        gan, x2, kl, rkl, h2, w1    E_others[neg(u)] − E_own[pos(u)] with the pairs of expectations of its code

    Hjelm et al. 2019. Its code of dv is wrong for more than one location; this is the formula. The pair of "x2",
    u² and −½(|u| + 1)², is its code's and no variational bound of χ².

    Args:
        local: [N, L, D] float.
        global_: [N, D] or [N, M, D] float.
        measure: one of those named.
        backend: of the kernel behind nce, jsd and dv.

    Returns:
        0-d, to be minimised, with gradients to both.

    Raises:
        TypeError: another type or dtype.
        ValueError: shapes do not fit, fewer than two pictures, or another `measure`.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {', '.join(MEASURES)}, got {measure!r}")
    if local.ndim != 3:
        raise ValueError(f"local: expected [N, L, D], got {list(local.shape)}")
    if len(local) < 2:
        raise ValueError(f"local: expected at least 2 pictures to contrast, got {len(local)}")
    if measure == "nce":
        bound = mutual_information(global_, local, bound="nce", own_logit=_OWN_LOGIT, backend=backend)
        return math.log1p((len(local) - 1) * local.shape[1]) - bound
    if measure in ("jsd", "dv"):
        return -mutual_information(global_, local, bound=measure, backend=backend)
    global_ = global_[:, None] if global_.ndim == 2 else global_
    if global_.ndim != 3 or global_.shape[::2] != local.shape[::2]:
        raise ValueError(f"global_: expected [{len(local)}, M, {local.shape[2]}], got {list(global_.shape)}")
    own, others = _EXPECTATIONS[measure]
    wide = torch.promote_types(local.dtype, torch.float32)
    same = torch.eye(len(local), dtype=torch.bool, device=local.device)
    # autocast would take the product back to half precision
    with torch.autocast(local.device.type, enabled=False):
        u = torch.einsum("nmd,kld->nkml", global_.to(wide), local.to(wide))
        return others(u[~same]).mean() - own(u[same]).mean()


class MutualInformationNet(nn.Module):
    """Features to those whose dot products estimate mutual information.

        LayerNorm( W₂ relu(BN(W₁ x)) + b₂ + S x ),  S near the identity

    MI1x1ConvNet and MIFCNet of Deep InfoMax: a 1×1 convolution is this linear map at each location.

    Args:
        in_features: width of the features.
        units: width of the result.
    """

    def __init__(self, in_features: int, units: int = 2048) -> None:
        super().__init__()
        self.nonlinear = nn.Sequential(
            nn.Linear(in_features, units, bias=False),
            nn.BatchNorm1d(units),
            nn.ReLU(),
            nn.Linear(units, units),
        )
        self.shortcut = nn.Linear(in_features, units, bias=False)
        nn.init.uniform_(self.shortcut.weight, -0.01, 0.01)
        with torch.no_grad():
            self.shortcut.weight.diagonal().fill_(1.0)
        self.norm = nn.LayerNorm(units)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., units]."""
        rows = x.flatten(0, -2)
        mixed: Tensor = self.norm(self.nonlinear(rows) + self.shortcut(rows))
        return mixed.unflatten(0, x.shape[:-1])


class DeepInfoMax(nn.Module):
    """Deep InfoMax on what an image encoder returns: local, global and prior terms.

        L = local_weight L(l, m) + global_weight L(g, m) + prior_weight softplus(−D(σ(c)))

    with m from the picture's vector, l from each location, g from the whole map at once, and a discriminator D that
    tells σ(c) from uniform noise by its own loss softplus(−D(noise)) + softplus(D(σ(c))) (non-saturating). Hjelm et al.
    2019, whose encoder has a fully connected layer on top; here the vector is the encoder's pooled one, and c a linear map
    of it, since what comes out of a ReLU reaches no number below 1/2.

    Args:
        local_width: W of the locations.
        global_width: of the picture's vector.
        measure: see `deep_infomax_loss`.
        units: width of the features whose dot products are taken.
        local_weight, global_weight, prior_weight: of the terms; 0 leaves a term and its network out.
        regions: locations of a picture; needed by the global term.
        backend: of the kernel; "auto" takes the fastest.

    Raises:
        ValueError: a value out of range, no term, or the global term without `regions`.
    """

    def __init__(
        self,
        local_width: int,
        global_width: int,
        *,
        measure: str = "jsd",
        units: int = 2048,
        local_weight: float = 1.0,
        global_weight: float = 0.0,
        prior_weight: float = 0.0,
        regions: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ValueError(f"measure: expected one of {', '.join(MEASURES)}, got {measure!r}")
        for name, size in (("local_width", local_width), ("global_width", global_width), ("units", units)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        weights = {"local": local_weight, "global": global_weight, "prior": prior_weight}
        if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"weights: expected 0 or more and one above 0, got {weights}")
        if global_weight and (regions is None or regions < 1):
            raise ValueError(f"regions: the global term needs how many locations there are, got {regions}")
        self._config: dict[str, Any] = {
            "local_width": local_width,
            "global_width": global_width,
            "measure": measure,
            "units": units,
            **{f"{name}_weight": weight for name, weight in weights.items()},
            "regions": regions,
            "backend": backend,
        }
        self.local_width, self.global_width = local_width, global_width
        self.measure, self.weights, self.regions, self.backend = measure, weights, regions, backend
        self.local_net = MutualInformationNet(local_width, units) if local_weight else None
        self.map_net = MutualInformationNet((regions or 1) * local_width, units) if global_weight else None
        self.global_net = MutualInformationNet(global_width, units) if local_weight or global_weight else None
        self.code = nn.Linear(global_width, global_width) if prior_weight else None
        self.discriminator = _discriminator(global_width) if prior_weight else None
        self.register_load_state_dict_pre_hook(_plain_code)

    def forward(self, tokens: Tensor, global_: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of a batch of pictures.

        Args:
            tokens: [N, R, local_width], the locations of each.
            global_: [N, global_width], the vector of each.

        Returns:
            Weighted 0-d losses "local", "global" and "prior", as far as they have a weight, with gradients to the
            encoder, and "discriminator", which reaches the discriminator alone; and what is worth plotting.

        Raises:
            ValueError: fewer than two pictures, or shapes that do not fit.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.local_width:
            raise ValueError(f"tokens: expected [N, R, {self.local_width}], got {list(tokens.shape)}")
        if global_.shape != (len(tokens), self.global_width):
            raise ValueError(
                f"global_: expected [{len(tokens)}, {self.global_width}], got {list(global_.shape)}"
            )
        losses: dict[str, Tensor] = {}
        plots: dict[str, Tensor] = {}
        if self.global_net is not None:
            whole = self.global_net(global_)[:, None]
            if self.local_net is not None:
                losses["local"] = self._loss(self.local_net(tokens), whole)
            if self.map_net is not None:
                if tokens.shape[1] != self.regions:
                    raise ValueError(f"tokens: expected {self.regions} locations, got {tokens.shape[1]}")
                losses["global"] = self._loss(self.map_net(tokens.flatten(1))[:, None], whole)
            plots = {name: loss.detach() for name, loss in losses.items()}
            losses = {name: self.weights[name] * loss for name, loss in losses.items()}
        if self.code is not None and self.discriminator is not None:
            code = self.code(global_).sigmoid()
            real = self.discriminator(torch.rand_like(code))
            losses["prior"] = self.weights["prior"] * F.softplus(-self.discriminator(code)).mean()
            fake = self.discriminator(code.detach())
            losses["discriminator"] = F.softplus(-real).mean() + F.softplus(fake).mean()
            plots["discriminator_accuracy"] = torch.cat([real > 0, fake < 0]).float().mean()
        return losses, plots

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this objective again, in JSON types."""
        return dict(self._config)

    def _loss(self, local: Tensor, whole: Tensor) -> Tensor:
        return deep_infomax_loss(local, whole, self.measure, backend=self.backend)


def _plain_code(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Weights from before there was a map to the code: the vector itself was the code."""
    code = module.code
    if isinstance(code, nn.Linear) and f"{prefix}discriminator.0.weight" in state:
        state.setdefault(f"{prefix}code.weight", torch.eye(code.in_features, dtype=code.weight.dtype))
        state.setdefault(f"{prefix}code.bias", torch.zeros_like(code.bias))


def _discriminator(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(), nn.Linear(200, 1)
    )
