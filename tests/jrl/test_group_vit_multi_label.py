"""The multi-label objective: golden values in both forms, duplicate texts, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.objectives.multi_label import MultiLabelObjective
from tests.ops.conformance import det


def golden_inputs() -> tuple[Tensor, Tensor, Tensor]:
    image = F.normalize(det(4, 6, a=0.37), dim=-1)
    texts = F.normalize(det(4, 3, 6, a=0.71), dim=-1).flatten(0, 1)
    return image, texts, torch.arange(4).repeat_interleave(3)


def objective(**options: Any) -> MultiLabelObjective:
    module = MultiLabelObjective(**options).double()
    with torch.no_grad():
        module.log_scale.fill_(-math.log(0.07))
    return module


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("multi_positive", "direction", "value"),
    [
        ("mean", "x_to_y", 11.4005142996),
        ("mean", "y_to_x", 9.8665282039),
        ("mean", "both", 10.6335212517),
        ("sum", "x_to_y", 2.2739793301),
        ("sum", "y_to_x", 9.8665282039),
        ("sum", "both", 12.1405075340 / 2),
    ],
)
def test_golden_values_of_code_and_patent(
    backend: str, multi_positive: str, direction: str, value: float
) -> None:
    loss, stats = objective(multi_positive=multi_positive, direction=direction, backend=backend)(
        *golden_inputs()
    )
    assert loss.item() == pytest.approx(value, rel=1e-9)
    assert stats["scale"].item() == pytest.approx(1 / 0.07, rel=1e-9)


def dense(
    x: Tensor, y: Tensor, scale: Tensor, owners: Tensor, same: Tensor, role: str, multi_positive: str
) -> Tensor:
    """The same loss in words: a Python loop over pictures, then over texts."""
    logits = scale * x @ y.T
    count = len(x)
    positive = torch.zeros(count, len(y), dtype=torch.bool)
    copies = torch.zeros_like(positive)
    for i in range(count):
        mine = {int(same[j]) for j in range(len(y)) if int(owners[j]) == i}
        for j in range(len(y)):
            positive[i, j] = int(owners[j]) == i
            copies[i, j] = int(same[j]) in mine and not positive[i, j]
    if role == "positive":
        positive = positive | copies

    def side(logits: Tensor, positive: Tensor, copies: Tensor) -> Tensor:
        losses = []
        for row, hits, twins in zip(logits, positive, copies, strict=True):
            if not hits.any():
                continue
            kept = ~twins if role == "exclude" else torch.ones_like(twins)
            top = row[hits].mean() if multi_positive == "mean" else row[hits].logsumexp(0)
            losses.append(row[kept].logsumexp(0) - top)
        return torch.stack(losses).mean()

    return (side(logits, positive, copies) + side(logits.T, positive.T, copies.T)) / 2


@pytest.mark.parametrize("multi_positive", ["mean", "sum"])
@pytest.mark.parametrize("role", ["negative", "exclude", "positive"])
def test_duplicate_texts_play_their_role(role: str, multi_positive: str) -> None:
    torch.manual_seed(0)
    x = F.normalize(torch.randn(5, 7, dtype=torch.float64), dim=-1).requires_grad_()
    y = F.normalize(torch.randn(9, 7, dtype=torch.float64), dim=-1).requires_grad_()
    owners = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3])  # the fifth picture has no text
    same = torch.tensor([7, -3, 7, 10, 11, -3, 12, 7, 12])
    ours = objective(duplicate_texts=role, multi_positive=multi_positive)
    loss, _ = ours(x, y, owners, text_ids=same)
    wanted = dense(x, y, ours.scale, owners, same, role, multi_positive)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    inputs = (x, y, ours.log_scale)
    for found, expected in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_roles_differ_and_unique_texts_make_them_agree() -> None:
    image, texts, owners = golden_inputs()
    twice = torch.arange(12)
    twice[4] = 0
    values = {}
    for role in ("negative", "exclude", "positive"):
        loss = objective(duplicate_texts=role)
        values[role] = loss(image, texts, owners, text_ids=twice)[0].item()
        assert loss(image, texts, owners, text_ids=torch.arange(12))[0].item() == pytest.approx(
            10.6335212517, rel=1e-6
        )
    assert len({round(value, 6) for value in values.values()}) == 3
    assert values["exclude"] < values["negative"]


def test_no_text_at_all_is_no_loss() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    nobody = torch.zeros(0, dtype=torch.int64)
    loss, _ = MultiLabelObjective()(x, torch.zeros(0, 4), nobody)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None and not x.grad.any()


def test_bfloat16_under_autocast_keeps_scores_in_float32() -> None:
    image, texts, owners = (
        value.float() if value.is_floating_point() else value for value in golden_inputs()
    )
    ours = MultiLabelObjective("exclude")
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = ours(image, texts, owners, text_ids=torch.arange(12))
    assert loss.item() == pytest.approx(10.6335212517, rel=1e-5)


def test_config_builds_it_again() -> None:
    ours = MultiLabelObjective("positive", multi_positive="sum", max_scale=None, init_scale=3.0)
    again = MultiLabelObjective(**ours.to_config())
    assert again.to_config() == ours.to_config()
    assert again.scale.item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "words"),
    [
        ({"duplicate_texts": "maybe"}, {}, ValueError, "duplicate_texts"),
        ({"duplicate_texts": "exclude"}, {}, ValueError, "text_ids"),
        ({}, {"owners": torch.zeros(5, dtype=torch.int64)}, ValueError, "owners"),
        ({}, {"owners": torch.zeros(12)}, TypeError, "owners"),
        ({}, {"text_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "text_ids"),
    ],
)
def test_bad_input(
    options: dict[str, Any], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    image, texts, owners = golden_inputs()
    with pytest.raises(error, match=words):
        objective(**options)(image, texts, **{"owners": owners, **arguments})
