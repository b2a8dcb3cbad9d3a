"""Retrieval, zero-shot accuracy and the bound, against what the definitions give by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jrl.evaluation import (
    chance_recall,
    evaluate,
    info_nce_bound,
    retrieval_metrics,
    retrieval_ranks,
    to_markdown,
    zero_shot_accuracy,
)


def det(shape: tuple[int, ...], a: float) -> Tensor:
    count = math.prod(shape)
    return torch.sin(a * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


def ranks_of_matrix(scores: Tensor) -> tuple[Tensor, Tensor]:
    ranks = retrieval_ranks(scores, torch.eye(scores.shape[1], dtype=scores.dtype))
    return ranks.image_to_text, ranks.text_to_image


def test_golden_ranks() -> None:
    rows, columns = ranks_of_matrix(det((5, 5), 0.37))
    assert rows.tolist() == [4, 1, 4, 1, 4]
    assert columns.tolist() == [2, 2, 4, 1, 2]
    assert retrieval_metrics(rows)["median_rank"] == 5
    assert retrieval_metrics(rows)["mean_rank"] == pytest.approx(3.8)
    assert retrieval_metrics(columns)["median_rank"] == 3
    assert retrieval_metrics(columns)["mean_rank"] == pytest.approx(3.2)


def test_median_of_an_even_number_averages_before_the_floor() -> None:
    assert retrieval_metrics(torch.tensor([0, 3]))["median_rank"] == 2
    assert retrieval_metrics(torch.tensor([0, 2]))["median_rank"] == 2
    assert retrieval_metrics(torch.tensor([0, 2, 5, 9]))["median_rank"] == 4


def test_recall_counts_ranks_below_k() -> None:
    metrics = retrieval_metrics(torch.tensor([0, 1, 4, 5, 9, 10]))
    assert metrics["r1"] == pytest.approx(1 / 6)
    assert metrics["r5"] == pytest.approx(3 / 6)
    assert metrics["r10"] == pytest.approx(5 / 6)


def test_several_captions_take_the_best_and_ignore_their_sisters() -> None:
    # captions 0-2 belong to picture 0, 3 and 4 to picture 1
    scores = torch.tensor([[0.1, 0.9, 0.8, 0.85, 0.0], [0.5, 0.95, 0.2, 0.1, 0.6]])
    owner = torch.tensor([0, 0, 0, 1, 1])
    ranks = retrieval_ranks(scores, torch.eye(5), owner)
    assert ranks.image_to_text.tolist() == [0, 1]
    # caption 1 and caption 0 score higher with the other picture
    assert ranks.text_to_image.tolist() == [1, 1, 0, 1, 0]


def test_ties_and_nan_count_against_the_positive() -> None:
    rows, columns = ranks_of_matrix(torch.zeros(4, 4))
    assert rows.tolist() == [3, 3, 3, 3]
    assert columns.tolist() == [3, 3, 3, 3]
    image, text = torch.eye(3), torch.eye(3)
    image[1] = float("nan")
    ranks = retrieval_ranks(image, text)
    assert ranks.image_to_text.tolist() == [0, 2, 0]


def test_ranks_are_those_of_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(37, 8, generator=generator), torch.randn(74, 8, generator=generator)
    owner = torch.arange(74) % 37
    ranks = retrieval_ranks(image, text, owner)
    scores = image.double() @ text.double().T
    own = owner == torch.arange(37)[:, None]
    best = scores.masked_fill(~own, -math.inf).amax(1, keepdim=True)
    assert torch.equal(ranks.image_to_text, ((scores >= best) & ~own).sum(1))
    of_text = scores.T.gather(1, owner[:, None])
    assert torch.equal(ranks.text_to_image, (of_text <= scores.T).sum(1) - 1)


def test_chance_matches_counting() -> None:
    assert chance_recall(1, 300) == pytest.approx(1 / 300)
    assert chance_recall(10, 150) == pytest.approx(10 / 150)
    assert chance_recall(10, 10) == 1
    assert chance_recall(2, 5, 2) == pytest.approx(1 - math.comb(3, 2) / math.comb(5, 2))


def test_bound_reaches_its_ceiling_and_matches_the_formula() -> None:
    x = torch.nn.functional.normalize(det((6, 4), 0.37), dim=-1)
    y = torch.nn.functional.normalize(det((6, 4), 0.53), dim=-1)
    logits = 7.0 * x @ y.T
    labels = torch.arange(6)
    loss = (
        torch.nn.functional.cross_entropy(logits, labels)
        + torch.nn.functional.cross_entropy(logits.T, labels)
    ) / 2
    bound = info_nce_bound(x, y, 7.0)
    assert bound["bound_nats"] == pytest.approx(math.log(6) - float(loss), abs=1e-6)
    perfect = info_nce_bound(torch.eye(6), torch.eye(6), 100.0)
    assert perfect["bound_ceiling"] == math.log(6)
    assert perfect["bound_nats"] == pytest.approx(math.log(6), abs=1e-4)


def test_evaluate_and_its_table() -> None:
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    result = evaluate(torch.eye(3), torch.eye(3)[owner], owner, scale=50.0)
    assert result["i2t_r1"] == result["t2i_r1"] == result["mean_recall"] == 1
    assert result["pictures"] == 3
    assert result["captions"] == 6
    assert result["bound_nats"] == pytest.approx(math.log(3), abs=1e-4)
    table = to_markdown({"test": result, "plain": evaluate(torch.eye(3), torch.eye(3))})
    assert (
        "| test | image to text | 100.0% | 100.0% | 100.0% | 1 | 1.0 | 33.3% / 100.0% | 1.10 of at most 1.10 |"
        in table
    )
    assert "| plain | text to image |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_zero_shot_accuracy() -> None:
    classifier = torch.eye(6)
    image = torch.eye(6)[[0, 1, 2, 3]] + 0.5 * torch.eye(6)[[1, 0, 5, 4]]
    accuracy = zero_shot_accuracy(image, classifier, torch.tensor([0, 0, 2, 1]))
    assert accuracy == {"top1": 0.5, "top5": 0.75}
    assert zero_shot_accuracy(torch.zeros(2, 6), classifier, torch.tensor([0, 1])) == {
        "top1": 0.0,
        "top5": 0.0,
    }
    assert "top5" not in zero_shot_accuracy(torch.eye(3), torch.eye(3), torch.arange(3))


@pytest.mark.parametrize(
    ("image", "text", "owner", "error", "words"),
    [
        (torch.eye(3), torch.eye(4), None, ValueError, "width 3"),
        (torch.eye(3), torch.ones(4, 3), None, ValueError, "4 captions meet 3"),
        (torch.eye(3), torch.eye(3), torch.tensor([0, 1, 3]), ValueError, r"\[0, 3\)"),
        (torch.eye(3), torch.eye(3), torch.tensor([0, 1, 1]), ValueError, "picture 2 has no caption"),
        (torch.eye(3), torch.eye(3), torch.tensor([0.0, 1.0, 2.0]), TypeError, "int64"),
        (torch.eye(3).long(), torch.eye(3), None, TypeError, "image"),
        (torch.zeros(0, 3), torch.zeros(0, 3), None, ValueError, "at least one row"),
        (torch.eye(3), torch.eye(3), torch.tensor([0, 1]), ValueError, r"expected \[3\]"),
    ],
)
def test_bad_input_names_the_argument(
    image: Tensor, text: Tensor, owner: Tensor | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        retrieval_ranks(image, text, owner)


def test_bad_labels_and_ranks() -> None:
    with pytest.raises(ValueError, match="labels"):
        zero_shot_accuracy(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 7]))
    with pytest.raises(TypeError, match="labels"):
        zero_shot_accuracy(torch.eye(3), torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match="classifier"):
        zero_shot_accuracy(torch.eye(3), torch.eye(4), torch.arange(3))
    with pytest.raises(ValueError, match="ranks"):
        retrieval_metrics(torch.tensor([]))
    with pytest.raises(ValueError, match="positives"):
        chance_recall(1, 3, 4)
