"""The contrastive objective: golden values, its parameters, its options and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.objectives import ContrastiveObjective, duplicate_text_ids


def det(shape: tuple[int, ...], a: float) -> Tensor:
    count = math.prod(shape)
    return torch.sin(a * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


def pair(rows: int = 6, width: int = 5) -> tuple[Tensor, Tensor]:
    return F.normalize(det((rows, width), 0.37), dim=-1), F.normalize(det((rows, width), 0.53), dim=-1)


def test_golden_clip_loss() -> None:
    objective = ContrastiveObjective(init_scale=1 / 0.07, backend="reference").double()
    objective.log_scale.data.fill_(math.log(1 / 0.07))
    loss, _ = objective(F.normalize(det((4, 6), 0.37), dim=-1), F.normalize(det((4, 6), 0.53), dim=-1))
    assert loss.item() == pytest.approx(14.5379491598, rel=1e-9)


def test_statistics_are_named_and_detached() -> None:
    x, y = pair()
    loss, stats = ContrastiveObjective(backend="reference").double()(x, y)
    assert set(stats) == {
        "scale",
        *(f"{kind}_{side}" for kind in ("accuracy", "entropy", "bound") for side in ("x_to_y", "y_to_x")),
    }
    assert not any(value.requires_grad for value in stats.values())
    mean_bound = (stats["bound_x_to_y"] + stats["bound_y_to_x"]) / 2
    assert float(mean_bound) == pytest.approx(math.log(6) - loss.item(), abs=1e-6)
    assert float(stats["scale"]) == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize("side", ["x_to_y", "y_to_x"])
def test_one_direction_reports_that_direction_only(side: str) -> None:
    x, y = pair()
    loss, stats = ContrastiveObjective(direction=side, backend="reference").double()(x, y)
    assert {name for name in stats if name != "scale"} == {
        f"{kind}_{side}" for kind in ("accuracy", "entropy", "bound")
    }
    logits = (x @ y.T) / 0.07
    expected = F.cross_entropy(logits if side == "x_to_y" else logits.T, torch.arange(6))
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)


def test_scale_stops_at_its_bound_and_can_leave_it() -> None:
    x, y = pair()
    free = ContrastiveObjective(init_scale=120.0, max_scale=None, backend="reference").double()
    bounded = ContrastiveObjective(init_scale=120.0, backend="reference").double()
    assert float(bounded.scale) == pytest.approx(100, rel=1e-6)
    assert float(free.scale) == pytest.approx(120, rel=1e-6)
    for objective in (free, bounded):
        objective(x, y)[0].backward()
        assert (
            float(objective.log_scale.grad) > 0
        )  # these pairs do not match, so the loss wants a smaller scale
    optimizer = torch.optim.SGD(bounded.parameters(), lr=0.01)
    optimizer.step()
    assert float(bounded.scale) < 100
    with torch.no_grad():
        bounded.log_scale.fill_(9.0)
    bounded(x, y)
    assert float(bounded.log_scale) == pytest.approx(math.log(100), rel=1e-6)


def test_gradient_of_the_temperature() -> None:
    x, y = pair()
    objective = ContrastiveObjective(backend="reference").double()
    objective(x, y)[0].backward()
    t = objective.log_scale.detach().clone().requires_grad_()
    logits = t.exp() * x @ y.T
    labels = torch.arange(6)
    ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
    assert float(objective.log_scale.grad) == pytest.approx(float(t.grad), rel=1e-9)


def test_sigmoid_starts_as_siglip_and_matches_its_formula() -> None:
    x, y = pair()
    objective = ContrastiveObjective("sigmoid", backend="reference").double()
    assert isinstance(objective.bias, torch.nn.Parameter)
    assert float(objective.bias) == -10
    assert float(objective.scale) == pytest.approx(10, rel=1e-6)
    loss, stats = objective(x, y)
    logits = objective.scale * x @ y.T + objective.bias
    signs = 2 * torch.eye(6, dtype=torch.float64) - 1
    assert loss.item() == pytest.approx(float(-F.logsigmoid(signs * logits).sum() / 6), rel=1e-9)
    assert set(stats) == {"scale"}
    loss.backward()
    assert objective.bias.grad is not None
    assert float(objective.bias.grad) != 0


def test_options_reach_the_op() -> None:
    x, y = pair()
    plain = ContrastiveObjective(backend="reference").double()
    base = plain(x, y)[0].item()
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    variants: list[dict[str, Any]] = [
        {"positives": (ids, ids)},
        {"exclude": ids},
        {"negatives": pair(9)[1]},
        {"weights": torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)},
    ]
    values = [plain(x, y, **options)[0].item() for options in variants]
    assert len({round(value, 9) for value in [base, *values]}) == 5
    summed = ContrastiveObjective(multi_positive="sum", backend="reference").double()
    assert float(summed(x, y, positives=(ids, ids))[0]) != pytest.approx(values[0], rel=1e-6)


def test_fixed_temperature_is_saved_but_not_trained() -> None:
    objective = ContrastiveObjective(init_scale=20.0, learnable=False)
    assert list(objective.parameters()) == []
    assert float(objective.state_dict()["log_scale"]) == pytest.approx(math.log(20))


@pytest.mark.parametrize(
    "options", [{}, {"loss": "sigmoid"}, {"direction": "x_to_y", "max_scale": None, "learnable": False}]
)
def test_config_round_trip(options: dict[str, Any]) -> None:
    objective = ContrastiveObjective(**options)
    again = ContrastiveObjective(**objective.to_config())
    assert again.to_config() == objective.to_config()
    assert set(again.state_dict()) == set(objective.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "hinge"}, "loss"),
        ({"direction": "up"}, "direction"),
        ({"multi_positive": "max"}, "multi_positive"),
        ({"loss": "sigmoid", "direction": "x_to_y"}, "sigmoid"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"init_scale": float("inf")}, "init_scale"),
        ({"max_scale": -1.0}, "max_scale"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ContrastiveObjective(**options)


def test_sigmoid_refuses_what_it_would_ignore() -> None:
    x, y = pair()
    with pytest.raises(ValueError, match="exclude, weights"):
        ContrastiveObjective("sigmoid")(x.float(), y.float(), exclude=torch.arange(6), weights=torch.ones(6))


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_rows_without_a_partner_need_positives(loss: str) -> None:
    x, y = (part.float() for part in pair())
    objective = ContrastiveObjective(loss)
    with pytest.raises(ValueError, match="the same number of rows without positives, got 6 and 4"):
        objective(x, y[:4])
    objective(x, y[:4], positives=torch.tensor([0, 1, 2, 3, 0, 1]))


def test_duplicate_ids_see_the_text_and_nothing_else() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [0, 5, 6, 7], [5, 7, 6, 0], [5, 6, 7, 9], [5, 6, 0, 0], [5, 6, 7, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    keys = duplicate_text_ids(ids, mask)
    assert keys.dtype == torch.int64
    assert keys[0] == keys[1] == keys[5]
    assert len({int(key) for key in keys}) == 4
    wider = F.pad(ids, (0, 5))
    assert torch.equal(duplicate_text_ids(wider, F.pad(mask, (0, 5))), keys)


def test_duplicate_ids_do_not_collide_on_many_texts() -> None:
    texts = torch.cartesian_prod(torch.arange(40), torch.arange(40), torch.arange(40))
    assert len(duplicate_text_ids(texts).unique()) == 64000


def test_duplicate_ids_refuse_wrong_input() -> None:
    with pytest.raises(TypeError, match="input_ids"):
        duplicate_text_ids(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="input_ids"):
        duplicate_text_ids(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="attention_mask"):
        duplicate_text_ids(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4))
