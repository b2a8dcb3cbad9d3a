"""What XMC-GAN is trained on fits what it draws from: padded texts, and pictures in [0, 1] of its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jrl.data.images import CLIP_MEAN, CLIP_STD
from jrl.training import Run

from .test_xmc_gan_system import batch
from .test_xmc_gan_system import build as build_bare
from .xmc_gan_fixtures import AtBatch, build, data, fit


class Keep(AtBatch):
    """Keeps the first batch."""

    def __init__(self) -> None:
        super().__init__(0, lambda system: None)
        self.kept: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *rest: Any) -> None:
        self.kept = self.kept or batch


@pytest.mark.parametrize("cached", [False, True])
def test_sentences_that_count_padding_are_trained_as_they_are_drawn(
    pictures: Path, tmp_path: Path, cached: bool
) -> None:
    system, keep = build(sentence_pooling="code"), Keep()
    options = {"text_cache": str(tmp_path / "cache")} if cached else {}
    given = data(pictures, padding="max_length", **options)
    fit(tmp_path, system, given, epochs=1, callbacks=[keep])
    assert given.tokenizer is not None and keep.kept["input_ids"].shape == (8, 16)
    trained, _, _ = system._embed_batch(keep.kept)
    texts = given.tokenizer.batch_decode(keep.kept["input_ids"], skip_special_tokens=True)
    # as `draw` does
    tokens = given.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    drawn, _, _ = system.embed(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(trained, drawn)
    # and the exported run does so too
    run = Run.load(tmp_path)
    assert run.padding == "max_length"
    together = run.encode_texts([texts[0], "a small yellow frame"])
    torch.testing.assert_close(run.encode_texts(texts[:1]), together[:1])
    run.save(tmp_path / "again")
    assert Run.load(tmp_path / "again").padding == "max_length"


def test_what_does_not_fit(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="padding: expected 'max_length' for a XMCGAN whose sentences count"):
        fit(tmp_path, build(sentence_pooling="code"), data(pictures))
    with pytest.raises(
        ValueError, match=r"mean, std: XMCGAN expects \(0.0, 0.0, 0.0\) and \(1.0, 1.0, 1.0\)"
    ):
        fit(tmp_path, build(), data(pictures, mean=CLIP_MEAN, std=CLIP_STD))
    with pytest.raises(ValueError, match=r"pixel_values: expected \[B, 3, 32, 32\], got \[4, 3, 64, 64\]"):
        fit(tmp_path, build(), data(pictures, image_size=64))
    with pytest.raises(ValueError, match=r"pixel_values: expected \[B, 3, 32, 32\], got \[4, 1, 32, 32\]"):
        build_bare()({**batch(), "pixel_values": torch.rand(4, 1, 32, 32)})
    with pytest.raises(ValueError, match="padding: expected one of longest, max_length, got 'shortest'"):
        data(pictures, padding="shortest")
