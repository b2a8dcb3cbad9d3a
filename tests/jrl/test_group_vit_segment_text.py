"""Texts that look for their segments: the objective, and GroupViT trained with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jrl.objectives.multi_label import MultiLabelObjective
from jrl.objectives.segment_text import SegmentTextObjective
from jrl.systems import GroupViT, load_system
from tests.jrl.group_vit_fixtures import batch_of_halves, perturb, sentences, small_group_vit, two_halves


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("multi_positive", ["mean", "sum"])
@pytest.mark.parametrize("role", ["negative", "exclude", "positive"])
def test_value_and_gradients_are_those_of_the_equation(role: str, multi_positive: str, backend: str) -> None:
    torch.manual_seed(0)
    segments = F.normalize(torch.randn(4, 3, 6, dtype=torch.float64), dim=-1).requires_grad_()
    texts = F.normalize(torch.randn(7, 6, dtype=torch.float64), dim=-1).requires_grad_()
    owners = torch.tensor([0, 0, 1, 1, 2, 2, 2])  # the fourth picture has no text
    same = torch.tensor([7, 8, 7, 9, 10, 8, 11])
    options: dict[str, Any] = {"duplicate_texts": role, "multi_positive": multi_positive, "backend": backend}
    ours = SegmentTextObjective(3.0, **options).double()
    loss, stats = ours(segments, texts, owners, text_ids=same)
    rows = []
    for picture in segments:
        cosines = texts @ picture.T  # [N, G]
        rows.append(((3.0 * cosines).softmax(dim=1) * cosines).sum(dim=1))
    # scores are products with unit vectors, so the tested objective of vectors can judge them
    scores = torch.stack(rows)
    judge = MultiLabelObjective(**options).double()
    wanted, _ = judge(scores, torch.eye(7, dtype=torch.float64), owners, text_ids=same)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert stats["scale"].item() == pytest.approx(1 / 0.07, rel=1e-6)
    inputs = (segments, texts)
    for found, expected in zip(
        torch.autograd.grad(loss, (*inputs, ours.log_scale)),
        torch.autograd.grad(wanted, (*inputs, judge.log_scale)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_without_attention_a_text_meets_the_mean_of_the_segments() -> None:
    torch.manual_seed(0)
    segments, texts = torch.randn(3, 4, 5), torch.randn(6, 5)
    owners = torch.arange(3).repeat_interleave(2)
    loss, _ = SegmentTextObjective(0.0)(segments, texts, owners)
    wanted, _ = MultiLabelObjective()(segments.mean(dim=1), texts, owners)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_no_text_at_all_costs_nothing() -> None:
    segments = torch.randn(3, 4, 5, requires_grad=True)
    loss, _ = SegmentTextObjective()(segments, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and segments.grad is not None and not segments.grad.any()


def with_objective(**options: Any) -> GroupViT:
    return small_group_vit(image={"drop_path": 0.0}, segment_text=SegmentTextObjective(**options))


def test_the_system_contrasts_its_segments_with_the_prompts_that_are_no_captions() -> None:
    system = with_objective(duplicate_texts="exclude").eval()
    perturb(system)
    batch = batch_of_halves(5, 0)
    batch["prompt_mask"][0, 1] = False  # the caption stands in for it
    losses, plots = system(batch)
    assert set(losses) == {"contrastive", "multi_label", "segment_text"}
    assert "segment_text_accuracy_x_to_y" in plots
    tokens = system.image_encoder(batch["pixel_values"]).tokens
    segments = F.normalize(system.image_projection(tokens.flatten(0, 1)), dim=-1).unflatten(0, (5, -1))
    real = torch.arange(10) != 1
    ids, mask = batch["prompt_ids"].flatten(0, 1)[real], batch["prompt_mask"].flatten(0, 1)[real]
    texts = system.encode_text(ids, mask).global_
    owners = torch.arange(5).repeat_interleave(2)[real]
    assert system.segment_text is not None
    wanted, _ = system.segment_text(segments, texts, owners, text_ids=ids[:, 1])
    assert losses["segment_text"].item() == pytest.approx(wanted.item(), abs=1e-5)
    del batch["prompt_ids"], batch["prompt_mask"]
    assert set(system(batch)[0]) == {"contrastive"}


def test_the_prompts_of_whole_pictures_have_a_weight() -> None:
    batch = batch_of_halves(5, 0)
    found = {
        weight: small_group_vit(multi_label_weight=weight).eval()(batch)[0] for weight in (1.0, 0.25, 0.0)
    }
    assert found[0.25]["multi_label"].item() == pytest.approx(found[1.0]["multi_label"].item() / 4)
    assert found[0.25]["contrastive"].item() == found[1.0]["contrastive"].item()
    assert set(found[0.0]) == {"contrastive"}
    assert small_group_vit(multi_label_weight=0.25).to_config()["multi_label_weight"] == 0.25


def test_every_weight_learns_and_the_system_is_saved(tmp_path: Path) -> None:
    system = with_objective(attention_scale=4.0).train()
    perturb(system)
    system(batch_of_halves(6, 0))[0]["segment_text"].backward()
    for part in ("image_encoder", "image_projection", "text_encoder", "text_projection", "segment_text"):
        gradients = [parameter.grad for parameter in system.get_submodule(part).parameters()]
        assert any(gradient is not None and gradient.any() for gradient in gradients), part
    system.save_pretrained(tmp_path / "model")
    loaded = load_system(tmp_path / "model")
    assert loaded.to_config() == system.to_config()
    assert isinstance(loaded, GroupViT) and isinstance(loaded.segment_text, SegmentTextObjective)
    assert loaded.segment_text.attention_scale == 4.0
    plain = small_group_vit().to_config()
    del plain["segment_text"]  # as a run from before this objective wrote it
    assert GroupViT.from_config(plain).segment_text is None


def right_pixels(system: GroupViT, steps: int) -> float:
    """Share of pixels of two-coloured pictures that get their colour, after some steps."""
    optimizer = torch.optim.AdamW(system.parameters(), lr=5e-3)
    for step in range(steps):
        torch.manual_seed(step)
        losses, _ = system.train()(batch_of_halves(32, step))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    pixels, pairs = two_halves(64, 999)
    names = system.eval().encode_text(*sentences(*[[10 + colour] for colour in range(4)])).global_
    found = system.segment(pixels, names, top_k=None).index
    truth = pairs.repeat_interleave(8, dim=1)[:, None].expand(-1, 16, -1)
    return float((found == truth).float().mean())


def test_words_find_their_pixels_with_this_loss_and_not_without() -> None:
    def built(segment_text: SegmentTextObjective | None) -> GroupViT:
        return small_group_vit(
            image={"depths": (1, 1), "group_tokens": (4, 0), "noise": "none", "drop_path": 0.0},
            duplicate_captions="exclude",
            multi_label=MultiLabelObjective("exclude"),
            segment_text=segment_text,
        )

    # chance is 0.25
    assert right_pixels(built(None), 60) < 0.4
    assert right_pixels(built(SegmentTextObjective(duplicate_texts="exclude")), 60) > 0.7


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: small_group_vit(multi_label_weight=-1.0),
            ValueError,
            "multi_label_weight: expected 0 or more",
        ),
        (lambda: SegmentTextObjective(-1.0), ValueError, "attention_scale: expected 0 or more, got -1.0"),
        (lambda: SegmentTextObjective(duplicate_texts="drop"), ValueError, "duplicate_texts"),
        (
            lambda: small_group_vit(segment_text=MultiLabelObjective()),
            TypeError,
            "segment_text: expected SegmentTextObjective, got MultiLabelObjective",
        ),
        (
            lambda: SegmentTextObjective(duplicate_texts="exclude")(
                torch.ones(1, 2, 3), torch.ones(1, 3), torch.zeros(1, dtype=torch.int64)
            ),
            ValueError,
            "text_ids",
        ),
        (
            lambda: SegmentTextObjective()(
                torch.ones(1, 2, 3), torch.ones(2, 3), torch.zeros(1, dtype=torch.int64)
            ),
            ValueError,
            "owners: expected [2]",
        ),
        (lambda: SegmentTextObjective(form="ring"), ValueError, "nothing goes round a ring"),
        (lambda: MultiLabelObjective("exclude", form="ring"), ValueError, "nothing goes round a ring"),
    ],
)
def test_bad_input(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        build()
