"""Frechet distance, inception score and R-precision against their formulas and golden values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore

from jrl.evaluation.generation import frechet_inception_distance, inception_score
from jrl.evaluation.r_precision import mismatched_texts, r_precision


def det(shape: tuple[int, ...], a: float) -> Tensor:
    count = math.prod(shape)
    return torch.sin(a * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def distance(x: Tensor, y: Tensor) -> float:
    """The formula, by Tr (C_1 C_2)^½ = Σ singular values of C_1^½ C_2^½."""
    a, b = x.T.cov(), y.T.cov()
    shift = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    return float(shift + a.trace() + b.trace() - 2 * torch.linalg.svdvals(root(a) @ root(b)).sum())


def test_golden_distance() -> None:
    found = frechet_inception_distance(det((50, 4), 0.37), 1.3 * det((60, 4), 0.53) + 0.2)
    # four sines of one frequency span two dimensions: the golden value's last digits are roots of eigenvalues that are zero
    assert found == pytest.approx(0.4308813186, abs=1e-7)


def test_golden_inception_score() -> None:
    mean, deviation = inception_score(3 * det((40, 7), 0.37))
    assert mean == pytest.approx(1.6370186404, rel=1e-9)
    assert deviation is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distance_is_the_formula(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    x = (
        torch.randn(9000, 6, generator=source, dtype=torch.float64)
        @ torch.randn(6, 6, generator=source).double()
    )
    y = 1.5 * torch.randn(70, 6, generator=source, dtype=torch.float64) + 3
    x, y = x.to(dtype), y.to(dtype)
    # float32 features are summed in float64 too: nothing is lost beyond their own rounding
    assert frechet_inception_distance(x, y) == pytest.approx(distance(x.double(), y.double()), rel=1e-9)
    assert frechet_inception_distance(x, y) == pytest.approx(frechet_inception_distance(y, x), rel=1e-9)


def test_distance_of_a_shift_and_of_itself() -> None:
    x = det((40, 3), 1.1)
    assert frechet_inception_distance(x, x + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25.0, rel=1e-9)
    assert 0 <= frechet_inception_distance(x, x) < 1e-9


def test_inception_score_of_known_pictures() -> None:
    """Sure of every picture, as many of each of four classes: 4. The same class always: 1."""
    sure = 200.0 * torch.eye(4).repeat(5, 1)
    assert inception_score(sure)[0] == pytest.approx(4.0)
    assert inception_score(sure[:1].repeat(9, 1))[0] == pytest.approx(1.0)
    assert inception_score(torch.zeros(9, 4))[0] == pytest.approx(1.0)


def test_splits_follow_from_the_seed_and_leave_the_generator_alone() -> None:
    logits = det((60, 5), 0.9) * 4
    before = torch.random.get_rng_state()
    first, again = inception_score(logits, splits=10, seed=3), inception_score(logits, splits=10, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == again != inception_score(logits, splits=10, seed=4)
    assert first[1] is not None and first[1] > 0


def test_every_split_is_one_of_the_score() -> None:
    """As many as asked for, of sizes that differ by one at most: 15 rows in 10 parts."""
    logits = det((15, 5), 0.9) * 4
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    parts = logits[order].tensor_split(10)
    assert [len(part) for part in parts] == [2] * 5 + [1] * 5
    scores = torch.tensor([inception_score(part)[0] for part in parts])
    mean, deviation = inception_score(logits, splits=10, seed=3)
    assert mean == pytest.approx(float(scores.mean()), rel=1e-6)
    assert deviation == pytest.approx(float(scores.std()), rel=1e-6)


def test_the_score_is_that_of_torchmetrics() -> None:
    logits = det((40, 7), 0.37) * 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        metric = InceptionScore(feature=torch.nn.Identity(), splits=4)
        metric.inception.num_features = 7  # type: ignore[assignment]
        metric.update(logits)
        expected = [float(value) for value in metric.compute()]
    assert list(inception_score(logits, splits=4, seed=5)) == pytest.approx(expected, rel=1e-9)


def test_mismatched_texts_differ_from_the_text_and_each_other() -> None:
    texts = [f"text {place % 30}" for place in range(60)]
    found = mismatched_texts(texts, 29)
    for row, places in enumerate(found.tolist()):
        drawn = [texts[place] for place in places]
        # 29 of 30 different texts: all but its own
        assert sorted({*drawn, texts[row]}) == sorted(set(texts))
        assert len(drawn) == len(set(drawn)) == 29
    assert torch.equal(mismatched_texts(texts, 5, seed=1), mismatched_texts(texts, 5, seed=1))
    assert not torch.equal(mismatched_texts(texts, 5, seed=1), mismatched_texts(texts, 5, seed=2))
    counts = mismatched_texts(texts, 5).flatten().bincount(minlength=60)
    assert int(counts[30:].sum()) == 0 and int(counts[:30].min()) > 0


def test_r_precision_of_right_half_right_and_blind_pictures() -> None:
    texts, vectors = [f"text {place}" for place in range(40)], torch.eye(40)
    assert r_precision(3 * vectors, vectors, texts, candidates=40).precision == 1
    half = torch.cat([vectors[:20], vectors[20:].roll(1, dims=0)])
    found = r_precision(half, vectors, texts, candidates=40)
    assert (found.precision, found.mean_rank) == (0.5, pytest.approx((20 + 20 * 40) / 40))
    # a picture that fits all texts equally knows none
    blind = r_precision(torch.ones(40, 7), det((1, 7), 0.3).repeat(40, 1), texts, candidates=10)
    assert (blind.precision, blind.mean_rank, blind.candidates) == (0.0, 10.0, 10)
    nan = r_precision(torch.full((40, 40), math.nan), vectors, texts, candidates=10)
    assert nan.precision == 0


def test_r_precision_of_noise_is_chance() -> None:
    source = torch.Generator().manual_seed(0)
    image, text = (torch.randn(2000, 16, generator=source) for _ in range(2))
    found = r_precision(image, text, [str(place) for place in range(2000)], candidates=10)
    assert found.precision == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 2000))


def test_what_the_metrics_refuse() -> None:
    x = det((8, 3), 0.4)
    with pytest.raises(
        ValueError, match="real: expected features \\[N, F\\] of at least 2 pictures, got \\[1, 3\\]"
    ):
        frechet_inception_distance(x[:1], x)
    with pytest.raises(ValueError, match="generated: expected features of width 3, as `real`, got 2"):
        frechet_inception_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="generated: expected finite values"):
        frechet_inception_distance(x, x / 0)
    with pytest.raises(ValueError, match="splits: expected at least 1, got 0"):
        inception_score(x, splits=0)
    with pytest.raises(
        ValueError, match="logits: expected \\[N, classes\\] with at least 9 rows, got \\[8, 3\\]"
    ):
        inception_score(x, splits=9)
    with pytest.raises(
        ValueError, match="texts: expected at least 3 different ones for 2 mismatched each, got 2"
    ):
        mismatched_texts(["a", "b", "a"], 2)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        mismatched_texts(["a", "b"], 0)
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        mismatched_texts(["a", "b"], 1, seed=-1)
    with pytest.raises(ValueError, match="candidates: expected at least 2, got 1"):
        r_precision(x, x, list("abcdefgh"), candidates=1)
    with pytest.raises(ValueError, match="image, text: expected two tensors"):
        r_precision(x, x[:7], list("abcdefgh"))
    with pytest.raises(ValueError, match="texts: expected 8, one a picture, got 2"):
        r_precision(x, x, ["a", "b"])
