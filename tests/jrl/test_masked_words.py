"""Masked words: which tokens are hidden, the tied embedding, learning, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.encoders import TextEncoder
from jrl.objectives import MaskedWords
from jrl.objectives.masked_words import corrupt
from tests.jrl.mutual_information_fixtures import BERT as SMALL_BERT

BERT = {**SMALL_BERT, "vocab_size": 30}
SPECIAL = (0, 1, 2, 3)


def words(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Texts in which word i is followed by i + 1: a hidden word follows from its neighbour."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(5, 20, (rows, 1), generator=generator)
    ids = torch.cat([torch.full((rows, 1), 2), first + torch.arange(6), torch.full((rows, 1), 0)], dim=1)
    return ids, ids != 0


def test_shares_of_the_hidden_words() -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (400, 100))
    candidates = torch.rand(ids.shape) < 0.9
    objective = MaskedWords(8, 1000, 4, SPECIAL)
    assert objective.words.tolist() == list(range(5, 1000))
    # what follows from the arguments is not saved
    assert set(objective.state_dict()) == {name for name, _ in objective.named_parameters()}
    hidden, chosen = corrupt(ids, candidates, objective.words, probability=0.15, mask_token_id=4)
    assert not (chosen & ~candidates).any()
    torch.testing.assert_close(hidden[~chosen], ids[~chosen])
    share = chosen.sum() / candidates.sum()
    assert float(share) == pytest.approx(0.15, abs=0.01)
    now, before = hidden[chosen], ids[chosen]
    assert float((now == 4).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((now == before).float().mean()) == pytest.approx(0.1, abs=0.02)
    drawn = now[(now != 4) & (now != before)]
    assert float(len(drawn) / len(now)) == pytest.approx(0.1, abs=0.02)
    assert int(drawn.min()) >= 5


def test_loss_is_cross_entropy_at_the_chosen_words_through_the_tied_embedding() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(BERT).eval()
    objective = MaskedWords(24, 30, 4, SPECIAL, probability=0.5)
    nn.init.normal_(objective.bias)
    ids, mask = words(5, 0)
    torch.manual_seed(3)
    loss, stats = objective(encoder, ids, mask)
    torch.manual_seed(3)
    candidates = mask & (ids > 4)
    hidden, chosen = corrupt(ids, candidates, objective.words, probability=0.5, mask_token_id=4)
    embedding = encoder.model.get_input_embeddings().weight
    logits = objective.transform(encoder(hidden, mask).tokens) @ embedding.T + objective.bias
    expected = F.cross_entropy(logits[chosen], ids[chosen])
    torch.testing.assert_close(loss, expected)
    right = (logits.argmax(dim=2) == ids)[chosen].float().mean()
    assert float(stats["accuracy"]) == pytest.approx(float(right))
    (gradient,) = torch.autograd.grad(loss, embedding)
    # words that are nowhere in the texts are pushed away, which only the output can do
    assert gradient[29].any()


def test_nothing_to_hide() -> None:
    encoder = TextEncoder(BERT)
    objective = MaskedWords(24, 30, 4, SPECIAL)
    loss, stats = objective(encoder, torch.tensor([[2, 0], [2, 3]]), torch.tensor([[1, 0], [1, 1]]))
    loss.backward()
    assert float(loss) == 0.0
    assert float(stats["accuracy"]) == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


def test_learns_to_guess() -> None:
    torch.manual_seed(0)
    encoder, objective = TextEncoder(BERT), MaskedWords(24, 30, 4, SPECIAL)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=5e-3)
    for step in range(150):
        loss, _ = objective(encoder, *words(64, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = [float(objective(encoder, *words(256, 1000 + i))[1]["accuracy"]) for i in range(4)]
    assert sum(accuracy) / 4 > 0.6
    assert MaskedWords(**objective.to_config()).to_config() == objective.to_config()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"mask_token_id: expected ids in \[0, 30\), got 30"):
        MaskedWords(24, 30, 30)
    with pytest.raises(ValueError, match=r"special_token_ids: expected ids in \[0, 30\), got -1"):
        MaskedWords(24, 30, 4, (-1,))
    with pytest.raises(ValueError, match=r"probability: expected a share in \(0, 1\], got 0"):
        MaskedWords(24, 30, 4, probability=0.0)
    with pytest.raises(ValueError, match="leave no word among 2 ids"):
        MaskedWords(24, 2, 1, (0,))
    with pytest.raises(ValueError, match="width, vocab_size: expected at least 1"):
        MaskedWords(0, 30, 4)
    with pytest.raises(ValueError, match=r"encoder: expected a word embedding \[40, 24\], got \[30, 24\]"):
        MaskedWords(24, 40, 4)(TextEncoder(BERT), torch.full((1, 3), 7))
    assert math.isfinite(float(MaskedWords(24, 30, 4)(TextEncoder(BERT), torch.full((4, 8), 7))[0]))
