"""The attention critic and the estimator: golden values, masks, bounds, refusals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.objectives import AttentionCritic, MutualInformationEstimator
from jrl.objectives.attention_critic import project

CRITIC = [
    [10.59313906, 9.20549071, 5.16173833],
    [11.66299637, 8.16229026, 5.32996377],
    [9.90282358, 7.64962846, 4.34428544],
]
BACKENDS = [("reference", torch.float64, 1e-9), ("auto", torch.float32, 2e-5)]


def det(shape: tuple[int, ...], a: float) -> Tensor:
    count = math.prod(shape)
    return torch.sin(a * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


def golden() -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([6, 4, 2])
    return det((3, 4, 5), 0.37), det((3, 6, 5), 0.53), torch.arange(6) < lengths[:, None]


def plain(**options: Any) -> AttentionCritic:
    return AttentionCritic(nn.Identity(), nn.Identity(), nn.Identity(), nn.Identity(), **options)


def networks(dim: int = 7) -> AttentionCritic:
    torch.manual_seed(0)

    def mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, dim)).double()

    return AttentionCritic(mlp(5), mlp(5), mlp(4), mlp(4), backend="reference")


@pytest.mark.parametrize(("backend", "dtype", "rtol"), BACKENDS)
def test_golden_patent_critic_and_its_bound(backend: str, dtype: torch.dtype, rtol: float) -> None:
    images, words, mask = golden()
    scores = plain(backend=backend)(images.to(dtype), words.to(dtype), word_mask=mask)
    # the matrix is given to eight decimals, the bounds to ten
    torch.testing.assert_close(scores.double(), torch.tensor(CRITIC).double(), rtol=max(rtol, 1e-7), atol=0)
    for direction, value in (("image_to_text", -2.0415379145), ("text_to_image", -0.4873152606)):
        loss, stats = MutualInformationEstimator(direction=direction, backend=backend)(scores)
        assert float(stats["bound"]) == pytest.approx(value, rel=rtol)
        assert float(loss) == pytest.approx(-value, rel=rtol)
        assert float(stats["ceiling"]) == pytest.approx(math.log(3), rel=1e-6)
    both = MutualInformationEstimator(backend=backend)(scores)[1]["bound"]
    assert float(both) == pytest.approx((-2.0415379145 - 0.4873152606) / 2, rel=rtol)


@pytest.mark.parametrize(("backend", "dtype", "rtol"), BACKENDS)
def test_golden_info_ground(backend: str, dtype: torch.dtype, rtol: float) -> None:
    images, words, mask = golden()
    # the published code takes the root of the width in float32
    scale = 1 / float(torch.tensor(5.0).sqrt())
    critic = plain(scale=scale, per_word=True, backend=backend)
    scores = critic(images.to(dtype), words.to(dtype), word_mask=mask)
    assert scores.shape == (3, 3, 6)
    estimator = MutualInformationEstimator(direction="text_to_image", backend=backend)
    loss, _ = estimator(scores, word_mask=mask)
    assert float(loss) + math.log(3) == pytest.approx(1.2270099764, rel=rtol)
    exact = plain(scale=None, per_word=True, backend=backend)(
        images.to(dtype), words.to(dtype), word_mask=mask
    )
    torch.testing.assert_close(exact, scores, rtol=1e-6, atol=1e-6)


def test_critic_is_the_formula_with_its_networks() -> None:
    critic = networks().eval()
    locations, words = det((3, 4, 5), 0.37), det((2, 6, 4), 0.53)
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    scores = critic(locations, words, word_mask=mask)
    for image in range(3):
        for caption in range(2):
            count = int(mask[caption].sum())
            q, w = critic.word_query(words[caption, :count]), critic.word_value(words[caption, :count])
            k, v = critic.image_key(locations[image]), critic.image_value(locations[image])
            share = (q @ k.T).softmax(dim=1)
            torch.testing.assert_close(scores[image, caption], (share * (w @ v.T)).sum())
    mean = AttentionCritic(
        critic.image_key,
        critic.image_value,
        critic.word_query,
        critic.word_value,
        length_norm="mean",
        backend="reference",
    )
    torch.testing.assert_close(mean(locations, words, word_mask=mask), scores / mask.sum(dim=1))


def test_padding_reaches_neither_scores_nor_statistics_nor_gradients() -> None:
    locations, words = det((3, 4, 5), 0.37), det((3, 6, 4), 0.53)
    mask = torch.arange(6) < torch.tensor([[6], [4], [2]])
    seen = torch.arange(4) < torch.tensor([[4], [3], [1]])
    results = []
    for filler in (0.0, 1e3, math.nan):
        critic = networks().train()
        image = locations.masked_fill(~seen[..., None], filler).requires_grad_()
        text = words.masked_fill(~mask[..., None], filler).requires_grad_()
        scores = critic(image, text, location_mask=seen, word_mask=mask)
        scores.square().sum().backward()
        statistics = critic.word_query[1].running_mean.clone()
        assert image.grad is not None
        assert text.grad is not None
        assert not text.grad[~mask].any()
        assert not image.grad[~seen].any()
        results.append((scores.detach(), statistics, text.grad, image.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_attention_of_pairs() -> None:
    critic = networks().eval()
    locations, words = det((3, 4, 5), 0.37), det((3, 6, 4), 0.53)
    mask = torch.arange(6) < torch.tensor([[6], [4], [2]])
    seen = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    attention = critic.attention(locations, words, location_mask=seen, word_mask=mask)
    assert attention.shape == (3, 6, 4)
    sums = attention.sum(dim=2)
    torch.testing.assert_close(sums[:2], mask[:2].to(sums))
    assert not sums[2].any()
    assert not attention[1, :, 1].any()
    # the score of a pair is its attention applied to the values
    whole = critic.attention(locations, words)
    values = critic.image_value(locations.flatten(0, 1)).unflatten(0, (3, 4))
    word_values = critic.word_value(words.flatten(0, 1)).unflatten(0, (3, 6))
    score = torch.einsum("btr,bre,bte->b", whole, values, word_values)
    torch.testing.assert_close(critic(locations, words).diagonal(), score)


def test_gradients_of_the_critic() -> None:
    critic = networks(dim=3).eval().requires_grad_(False)
    locations, words = det((2, 3, 5), 0.37).requires_grad_(), det((2, 4, 4), 0.53).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    assert torch.autograd.gradcheck(lambda x, y: critic(x, y, word_mask=mask), (locations, words))


def test_project_without_real_rows() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    rows = project(nn.Linear(4, 5), torch.full((2, 3, 4), math.nan), mask)
    assert rows.shape == (2, 3, 5)
    assert not rows.any()


@pytest.mark.parametrize("bound", ["nce", "jsd", "dv"])
def test_bounds_are_their_formulas(bound: str) -> None:
    scores = (3 * det((5, 5), 0.37)).requires_grad_()
    estimator = MutualInformationEstimator(bound, backend="reference")
    loss, stats = estimator(scores)
    own, off = scores.diagonal(), scores[~torch.eye(5, dtype=torch.bool)]
    if bound == "nce":
        rows, columns = scores.log_softmax(1).diagonal().mean(), scores.log_softmax(0).diagonal().mean()
        expected = math.log(5) + (rows + columns) / 2
    elif bound == "jsd":
        expected = (math.log(2) - F.softplus(-own)).mean() - (F.softplus(off) - math.log(2)).mean()
    else:
        expected = own.mean() - off.exp().mean().log()
    torch.testing.assert_close(-loss, expected)
    torch.testing.assert_close(stats["bound"], expected.detach())
    assert ("ceiling" in stats) == (bound == "nce")
    found, wanted = torch.autograd.grad(-loss, scores)[0], torch.autograd.grad(expected, scores)[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bound", ["jsd", "dv"])
def test_extreme_scores_stay_finite(bound: str) -> None:
    scores = (1e4 * det((4, 4), 0.37)).float().requires_grad_()
    loss, _ = MutualInformationEstimator(bound)(scores)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_excluded_duplicates_are_no_negatives() -> None:
    scores = 2 * det((4, 4), 0.37)
    ids = torch.tensor([7, 8, 7, 9])
    loss, stats = MutualInformationEstimator(direction="image_to_text", backend="reference")(
        scores, exclude=ids
    )
    kept = scores.clone()
    kept[0, 2] = kept[2, 0] = -math.inf
    # two of the four have three candidates left
    ceiling = (2 * math.log(3) + 2 * math.log(4)) / 4
    assert float(stats["ceiling"]) == pytest.approx(ceiling)
    assert float(loss) == pytest.approx(float(-ceiling - kept.log_softmax(1).diagonal().mean()))
    words = torch.stack([scores, scores.roll(1, 0)], dim=2)
    loss, _ = MutualInformationEstimator(direction="text_to_image", backend="reference")(words, exclude=ids)
    own = torch.eye(4, dtype=torch.bool)
    hidden = (ids[:, None] == ids) & ~own
    logits = words.masked_fill(hidden[..., None], -math.inf).log_softmax(0)
    assert float(loss) == pytest.approx(float(-ceiling - logits[own].mean()), rel=3e-6)


@pytest.mark.parametrize("direction", ["both", "image_to_text", "text_to_image"])
def test_duplicates_that_are_left_out_give_no_bound(direction: str) -> None:
    """Scores that know nothing are worth 0 nats, whatever is left out; a caption that is alone cannot be missed."""
    estimator = MutualInformationEstimator(direction=direction)
    for ids, ceiling in (
        (torch.zeros(8).long(), 0.0),
        (torch.arange(8) // 4, math.log(5)),
        (torch.arange(8), math.log(8)),
    ):
        for shape in ((8, 8), (8, 8, 3))[: 1 + (direction == "text_to_image")]:
            _, stats = estimator(torch.zeros(shape), exclude=ids)
            assert float(stats["bound"]) == pytest.approx(0, abs=3e-6)
            assert float(stats["ceiling"]) == pytest.approx(ceiling)
            assert float(stats["saturation"]) == pytest.approx(0, abs=3e-6)
        _, stats = estimator(1e3 * torch.eye(8), exclude=ids)
        assert float(stats["bound"]) == pytest.approx(ceiling, abs=1e-6)


def test_a_caption_without_words_counts_nothing() -> None:
    scores = det((3, 3, 2), 0.37).requires_grad_()
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    loss, _ = MutualInformationEstimator(direction="text_to_image", backend="reference")(
        scores, word_mask=mask
    )
    loss.backward()
    assert scores.grad is not None
    assert not scores.grad[:, ~mask].any()
    assert scores.grad[:, mask].all()
    own = torch.stack([scores[:, n, mask[n]].log_softmax(0)[n].mean() for n in (0, 2)])
    # info-ground's code adds a millionth of a word
    assert float(loss) == pytest.approx(float(-math.log(3) - own.mean()), abs=5e-6)
    for count in (0, 2):
        few = (torch.arange(4) < count)[:, None].expand(4, 2)
        _, stats = MutualInformationEstimator(direction="text_to_image")(torch.zeros(4, 4, 2), word_mask=few)
        assert float(stats["bound"]) == pytest.approx(0, abs=3e-6)
        assert float(stats["ceiling"]) == pytest.approx(math.log(4) if count else 0)


@pytest.mark.parametrize("bound", ["nce", "jsd", "dv"])
def test_pairs_that_do_not_count_are_as_if_they_were_not_there(bound: str) -> None:
    scores, ids = det((5, 5), 0.37).requires_grad_(), torch.tensor([7, 8, 9, 7, 7])
    valid = torch.tensor([True, False, True, True, False])
    exclude = {"exclude": ids} if bound == "nce" else {}
    estimator = MutualInformationEstimator(bound, backend="reference")
    loss, stats = estimator(scores, valid=valid, **exclude)
    fewer = scores.detach()[valid][:, valid].requires_grad_()
    alone, wanted = estimator(fewer, **({"exclude": ids[valid]} if exclude else {}))
    assert float(loss) == float(alone)
    assert {name: float(value) for name, value in stats.items()} == {k: float(v) for k, v in wanted.items()}
    (grad,), (few,) = torch.autograd.grad(loss, scores), torch.autograd.grad(alone, fewer)
    torch.testing.assert_close(grad[valid][:, valid], few)
    assert not grad[~valid].any()
    assert not grad[:, ~valid].any()
    for count in (0, 1):
        loss, stats = estimator(scores, valid=torch.arange(5) < count, **exclude)
        assert not any(stats.values())
        assert not torch.autograd.grad(loss, scores)[0].any()


def test_saturation_warns_once() -> None:
    estimator = MutualInformationEstimator()
    with pytest.warns(UserWarning, match="a larger batch is needed"):
        _, stats = estimator(20 * torch.eye(4))
    assert float(stats["saturation"]) > 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator(20 * torch.eye(4))
        MutualInformationEstimator()(torch.eye(4))


def test_refusals_of_the_critic() -> None:
    with pytest.raises(TypeError, match="word_query: expected a module, got int"):
        AttentionCritic(nn.Identity(), nn.Identity(), 3, nn.Identity())
    with pytest.raises(ValueError, match="length_norm: expected one of none, mean, got 'sum'"):
        plain(length_norm="sum")
    with pytest.raises(ValueError, match="length_norm: has no meaning with per_word"):
        plain(length_norm="mean", per_word=True)
    with pytest.raises(ValueError, match="scale: expected a positive finite number or None, got 0"):
        plain(scale=0)
    x = torch.zeros(2, 3, 4)
    for arguments, masks, kind, message in (
        ((x[0], x), {}, ValueError, r"locations: expected \[B, R, We\], got \[3, 4\]"),
        ((x, x.long()), {}, TypeError, "words: expected a floating tensor, got torch.int64"),
        ((x, x), {"word_mask": torch.ones(2, 3)}, TypeError, "word_mask: expected bool, got torch.float32"),
        (
            (x, x),
            {"word_mask": torch.ones(2, 2, dtype=torch.bool)},
            ValueError,
            r"word_mask: expected \[2, 3\]",
        ),
    ):
        with pytest.raises(kind, match=message):
            plain()(*arguments, **masks)
    with pytest.raises(ValueError, match="words: expected 2 captions as there are pictures, got 1"):
        plain().attention(x, x[:1])


def test_refusals_of_the_estimator() -> None:
    with pytest.raises(ValueError, match="bound: expected one of nce, jsd, dv, got 'kl'"):
        MutualInformationEstimator("kl")
    with pytest.raises(ValueError, match="direction: expected one of both"):
        MutualInformationEstimator(direction="rows")
    with pytest.raises(ValueError, match="direction: the bound 'jsd' is symmetric"):
        MutualInformationEstimator("jsd", "image_to_text")
    scores = torch.zeros(3, 3)
    with pytest.raises(TypeError, match="scores: expected a floating dtype"):
        MutualInformationEstimator()(scores.long())
    with pytest.raises(ValueError, match=r"scores: expected \[N, N\] or \[N, N, T\], got \[2, 3\]"):
        MutualInformationEstimator()(scores[:2])
    with pytest.raises(ValueError, match="need bound 'nce' and direction 'text_to_image'"):
        MutualInformationEstimator()(torch.zeros(3, 3, 2))
    with pytest.raises(ValueError, match="word_mask: needs scores of every word"):
        MutualInformationEstimator()(scores, word_mask=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"word_mask: expected bool \[3, 2\]"):
        MutualInformationEstimator(direction="text_to_image")(
            torch.zeros(3, 3, 2), word_mask=torch.ones(3, 3, dtype=torch.bool)
        )
    for valid in (torch.ones(2, dtype=torch.bool), torch.ones(3)):
        with pytest.raises(ValueError, match=r"valid: expected bool \[3\] for scores \[N, N\], got torch"):
            MutualInformationEstimator()(scores, valid=valid)
    with pytest.raises(ValueError, match="needs at least 2 pairs, got 1"):
        MutualInformationEstimator("dv")(scores[:1, :1])
    with pytest.raises(ValueError, match="exclude: the bound 'jsd' cannot leave pairs out"):
        MutualInformationEstimator("jsd")(scores, exclude=torch.zeros(3, dtype=torch.int64))
