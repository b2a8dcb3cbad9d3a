"""Deep InfoMax: golden values, every measure by its formula, prior matching, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.objectives import DeepInfoMax, MutualInformationNet, deep_infomax_loss
from jrl.objectives.deep_infomax import MEASURES

GOLDEN = {"nce": 1.9420820162, "jsd": -0.1413780092, "dv": -0.3107091438}


def det(shape: tuple[int, ...], a: float) -> Tensor:
    count = math.prod(shape)
    return torch.sin(a * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


def golden() -> tuple[Tensor, Tensor]:
    """Channels come before locations in the published code."""
    return det((3, 5, 4), 0.37).transpose(1, 2), det((3, 5, 1), 0.53).transpose(1, 2)


@pytest.mark.parametrize("measure", GOLDEN)
def test_golden(measure: str) -> None:
    local, whole = golden()
    loss = deep_infomax_loss(local, whole, measure, backend="reference")
    assert float(loss) == pytest.approx(GOLDEN[measure], rel=1e-9)
    fused = deep_infomax_loss(local.float(), whole.float(), measure)
    assert float(fused) == pytest.approx(GOLDEN[measure], rel=2e-5)
    assert float(deep_infomax_loss(local, whole[:, 0], measure, backend="reference")) == float(loss)


def test_nce_is_the_published_softmax() -> None:
    """The locations of a picture itself stand at −10 among the negatives."""
    local, whole = det((3, 4, 5), 0.37), det((3, 2, 5), 0.53)
    u = torch.einsum("nmd,kld->nmkl", whole, local)
    terms = []
    for n in range(3):
        for m in range(2):
            for place in range(4):
                negatives = u[n, m].clone()
                negatives[n] = -10.0
                logits = torch.cat([u[n, m, n, place][None], negatives.flatten()])
                terms.append(-logits.log_softmax(0)[0])
    expected = torch.stack(terms).mean()
    assert float(deep_infomax_loss(local, whole, "nce", backend="reference")) == pytest.approx(
        float(expected)
    )


EXPECTATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gan": (lambda u: -F.softplus(-u), lambda u: F.softplus(-u) + u),
    "jsd": (lambda u: math.log(2) - F.softplus(-u), lambda u: F.softplus(-u) + u - math.log(2)),
    "x2": (lambda u: u**2, lambda u: -0.5 * ((u**2).sqrt() + 1) ** 2),
    "kl": (lambda u: u, lambda u: (u - 1).exp()),
    "rkl": (lambda u: -(-u).exp(), lambda u: u - 1),
    "h2": (lambda u: 1 - (-u).exp(), lambda u: u.exp() - 1),
    "w1": (lambda u: u, lambda u: u),
}


def test_every_measure_is_its_pair_of_expectations() -> None:
    local, whole = golden()
    u = torch.einsum("nmd,kld->nkml", whole, local)
    own = torch.eye(3, dtype=torch.bool)
    assert {*EXPECTATIONS, "nce", "dv"} == set(MEASURES)
    for measure, (positive, negative) in EXPECTATIONS.items():
        loss = deep_infomax_loss(local, whole, measure, backend="reference")
        assert float(loss) == pytest.approx(float(negative(u[~own]).mean() - positive(u[own]).mean())), (
            measure
        )
    assert GOLDEN["dv"] == pytest.approx(
        float(u[~own].flatten().logsumexp(0) - math.log(u[~own].numel()) - u[own].mean())
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients(measure: str) -> None:
    local, whole = (side.clone().requires_grad_() for side in golden())
    assert torch.autograd.gradcheck(
        lambda x, y: deep_infomax_loss(x, y, measure, backend="reference"), (local, whole)
    )


def test_net_starts_near_the_identity() -> None:
    torch.manual_seed(0)
    net = MutualInformationNet(6, 10)
    assert net.shortcut.weight.diagonal().tolist() == [1.0] * 6
    apart = net.shortcut.weight.detach() - torch.eye(10, 6)
    assert 0 < float(apart.abs().max()) <= 0.01
    x = torch.randn(4, 3, 6)
    y = net(x)
    assert y.shape == (4, 3, 10)
    torch.testing.assert_close(y.mean(dim=2), torch.zeros(4, 3), atol=1e-5, rtol=0)
    assert not any(parameter.grad_fn for parameter in net.parameters())


def test_terms_and_who_learns_from_them() -> None:
    torch.manual_seed(0)
    objective = DeepInfoMax(
        6, 5, units=8, measure="nce", local_weight=0.5, global_weight=2.0, prior_weight=0.1, regions=9
    )
    tokens = torch.randn(4, 9, 6, requires_grad=True)
    vector = torch.randn(4, 5, requires_grad=True)
    losses, plots = objective(tokens, vector)
    assert set(losses) == {"local", "global", "prior", "discriminator"}
    assert losses["local"].item() == pytest.approx(0.5 * float(plots["local"]))
    assert losses["global"].item() == pytest.approx(2 * float(plots["global"]))
    assert all(not plot.requires_grad for plot in plots.values())
    assert objective.discriminator is not None
    apart = list(objective.discriminator.parameters())
    to_encoder = torch.autograd.grad(
        losses["discriminator"], [tokens, vector], retain_graph=True, allow_unused=True
    )
    assert to_encoder == (None, None)
    assert all(grad.any() for grad in torch.autograd.grad(losses["discriminator"], apart, retain_graph=True))
    assert torch.autograd.grad(losses["prior"], vector, retain_graph=True)[0].any()
    for name in ("local", "global"):
        grads = torch.autograd.grad(losses[name], [tokens, vector], retain_graph=True)
        assert all(grad.any() for grad in grads)
    assert DeepInfoMax(**objective.to_config()).to_config() == objective.to_config()


def test_prior_matching_drives_codes_to_the_uniform() -> None:
    """Those of a network that ends in a ReLU: its vectors are not negative, and their sigmoid is 1/2 at least."""
    torch.manual_seed(2)
    objective = DeepInfoMax(2, 3, local_weight=0.0, prior_weight=1.0)
    assert objective.discriminator is not None and objective.code is not None
    before = torch.nn.Parameter(0.1 * torch.randn(64, 3) + 2.0)
    tokens = torch.zeros(64, 1, 2)
    players = (
        torch.optim.Adam(objective.discriminator.parameters(), lr=1e-3),
        torch.optim.Adam([before, *objective.code.parameters()], lr=2e-2),
    )
    first = objective.code(before.relu()).sigmoid().detach()
    for _ in range(400):
        for player, name in zip(players, ("discriminator", "prior"), strict=True):
            losses, _ = objective(tokens, before.relu())
            player.zero_grad()
            losses[name].backward()
            player.step()
    after = objective.code(before.relu()).sigmoid().detach()
    # each number of the code alone: numbers that differ from each other and not between pictures spread too, in all
    assert float(first.std(dim=0).max()) < 0.02
    assert float(after.std(dim=0).min()) > 0.15  # 0.29 is uniform
    assert abs(float(after.mean()) - 0.5) < 0.15
    assert 0.3 < float((after < 0.5).float().mean()) < 0.7


def test_weights_from_before_the_map_to_the_code() -> None:
    """They said the same of a vector as they say now."""
    objective = DeepInfoMax(2, 3, units=4, prior_weight=1.0)
    older = {name: value for name, value in objective.state_dict().items() if not name.startswith("code.")}
    outer = torch.nn.ModuleDict({"image_objective": DeepInfoMax(2, 3, units=4, prior_weight=1.0)})
    outer.load_state_dict({f"image_objective.{name}": value for name, value in older.items()})
    code = outer["image_objective"].code
    assert torch.equal(code.weight, torch.eye(3)) and not code.bias.any()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*discriminator"):
        DeepInfoMax(2, 3, units=4, prior_weight=1.0).load_state_dict(DeepInfoMax(2, 3, units=4).state_dict())
    plain = DeepInfoMax(2, 3, units=4)
    assert plain.code is None
    plain.load_state_dict(DeepInfoMax(2, 3, units=4).state_dict())


@pytest.mark.parametrize("measure", sorted(set(MEASURES) - {"nce", "jsd", "dv"}))
def test_autocast_does_not_round_the_products(measure: str) -> None:
    torch.manual_seed(0)
    local, whole = torch.randn(6, 9, 64) / 4, torch.randn(6, 64) / 4
    wanted = deep_infomax_loss(local.bfloat16().float(), whole.bfloat16().float(), measure)
    with torch.autocast("cpu", torch.bfloat16):
        found = deep_infomax_loss(local.bfloat16(), whole.bfloat16(), measure)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_refusals() -> None:
    local, whole = golden()
    with pytest.raises(ValueError, match="measure: expected one of nce, jsd"):
        deep_infomax_loss(local, whole, "mine")
    with pytest.raises(ValueError, match=r"local: expected \[N, L, D\], got \[3, 5\]"):
        deep_infomax_loss(local[:, 0], whole)
    with pytest.raises(ValueError, match="local: expected at least 2 pictures to contrast, got 1"):
        deep_infomax_loss(local[:1], whole[:1], "nce")
    with pytest.raises(ValueError, match=r"global_: expected \[3, M, 5\], got \[2, 1, 5\]"):
        deep_infomax_loss(local, whole[:2], "gan")
    with pytest.raises(ValueError, match="weights: expected 0 or more and one above 0"):
        DeepInfoMax(4, 4, local_weight=0.0)
    with pytest.raises(ValueError, match="regions: the global term needs"):
        DeepInfoMax(4, 4, global_weight=1.0)
    with pytest.raises(ValueError, match="units: expected at least 1, got 0"):
        DeepInfoMax(4, 4, units=0)
    with pytest.raises(ValueError, match="measure: expected one of"):
        DeepInfoMax(4, 4, measure="mine")
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match="weights: expected 0 or more and one above 0"):
            DeepInfoMax(4, 4, local_weight=weight)
    with pytest.raises(ValueError, match=r"tokens: expected \[N, R, 4\], got \[2, 3, 5\]"):
        DeepInfoMax(4, 4, units=4)(torch.zeros(2, 3, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"global_: expected \[2, 4\], got \[2, 5\]"):
        DeepInfoMax(4, 4, units=4)(torch.zeros(2, 3, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="tokens: expected 3 locations, got 2"):
        DeepInfoMax(4, 4, units=4, global_weight=1.0, regions=3)(torch.zeros(2, 2, 4), torch.zeros(2, 4))
