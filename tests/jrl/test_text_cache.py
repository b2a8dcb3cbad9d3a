"""Cached text embeddings: the same losses as without, and nothing stale or damaged is taken."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException

from jrl.data.tokenizer import train_tokenizer
from jrl.encoders import TextEncoder
from jrl.systems.xmc_gan import XMCGAN
from jrl.training.text_cache import KEY, TextCache, key_of, write

from .xmc_gan_fixtures import BERT, AtBatch, build, data, fit

CAPTIONS = ["a large red circle", "a blue bar", "a frame"]


class Recorder(AtBatch):
    """Keeps the losses of every batch."""

    def __init__(self) -> None:
        super().__init__(0, lambda system: None)
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.seen.append(torch.stack(list(pl_module.losses.values())))


def trained(
    run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[Tensor], int]:
    """The losses of two epochs, and how often the text encoder ran in training."""
    recorder, calls = Recorder(), 0
    embed = XMCGAN.embed

    def counted(self: XMCGAN, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return embed(self, *arguments)

    monkeypatch.setattr(XMCGAN, "embed", counted)
    system = build(sentence_pooling="code")
    fit(run, system, data(pictures, padding="max_length", **options), callbacks=[recorder])
    monkeypatch.setattr(XMCGAN, "embed", embed)
    return recorder.seen, calls


def test_same_losses_without_the_encoder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, with_encoder = trained(tmp_path / "plain", pictures, monkeypatch)
    cache = str(tmp_path / "cache")
    written, without = trained(tmp_path / "written", pictures, monkeypatch, text_cache=cache)
    read, _ = trained(tmp_path / "read", pictures, monkeypatch, text_cache=cache)
    assert with_encoder == 24 and without == 0
    assert len(plain) == 12
    torch.testing.assert_close(torch.stack(written), torch.stack(plain), rtol=1e-3, atol=1e-3)
    # the first step, before rounding differences grow
    torch.testing.assert_close(written[0], plain[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.stack(read), torch.stack(written))


def texts(captions: list[str] = CAPTIONS) -> tuple[Any, list[str], Tensor, Tensor]:
    tokenizer = train_tokenizer(captions, vocabulary_size=300, max_length=16)
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return tokenizer, captions, tokens["input_ids"], tokens["attention_mask"].bool()


def encoder(seed: int = 0) -> TextEncoder:
    torch.manual_seed(seed)
    return TextEncoder(BERT).eval()


def test_rows(tmp_path: Path) -> None:
    model, (tokenizer, captions, ids, mask) = encoder(), texts()
    key = key_of(model, tokenizer, captions, ids, mask)
    write(tmp_path, model, key, ids, mask, batch_size=2)
    opened = TextCache(tmp_path, key)
    for cache in (opened, pickle.loads(pickle.dumps(opened))):
        rows = torch.tensor([2, 0])
        found = cache.rows(rows, slice(0, 3))
        with torch.no_grad():
            truth = model(ids[rows], mask[rows])
        torch.testing.assert_close(found["word_features"], truth.tokens[:, :3])
        torch.testing.assert_close(found["text_features"], truth.global_)


def test_stale(tmp_path: Path) -> None:
    model, given = encoder(), texts()
    key = key_of(model, *given)
    write(tmp_path, model, key, *given[2:])
    TextCache(tmp_path, key)
    other = encoder()
    with torch.no_grad():
        next(other.parameters())[5, 0] *= 1.001
    pooled = TextEncoder(other.model, pooling="cls")
    reordered = (given[0], given[1][::-1], *given[2:])
    retrained = (texts([*CAPTIONS, "a large red star"])[0], *given[1:])
    for changed, words in (
        (key_of(other, *given), "another text encoder;"),
        (key_of(pooled, *given), "another text encoder;"),
        (key_of(model, *reordered), "other captions;"),
        (key_of(model, *retrained), "another tokenizer;"),
        (key_of(model, *texts([*CAPTIONS, "a large red star"])), "another tokenizer, other captions;"),
    ):
        with pytest.raises(ValueError, match=f"holds the embeddings of {words} delete it, or name another"):
            TextCache(tmp_path, changed)


def test_damaged(tmp_path: Path) -> None:
    model, given = encoder(), texts()
    key = key_of(model, *given)
    with pytest.raises(FileNotFoundError, match="text_cache: .* holds none"):
        TextCache(tmp_path, key)
    write(tmp_path, model, key, *given[2:])
    path = tmp_path / "words.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"words.npy is missing or damaged; delete"):
        TextCache(tmp_path, key)
    path.unlink()
    with pytest.raises(ValueError, match=r"words.npy is missing or damaged; delete"):
        TextCache(tmp_path, key)
    (tmp_path / KEY).write_text("{")
    with pytest.raises(ValueError, match=r"key.json is unreadable"):
        TextCache(tmp_path, key)


def test_refusals(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_cache: captions that caption_mix draws"):
        data(pictures, text_cache=str(tmp_path), caption_mix={"first": 1.0})
    system = build()
    system.text_encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="text_cache: the text encoder is trained"):
        fit(tmp_path, system, data(pictures, text_cache=str(tmp_path / "cache")))


def test_a_folder_that_cannot_be_written(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="text_cache: .* could not be written: "):
        fit(tmp_path, build(), data(pictures, text_cache=str(tmp_path / "file" / "cache")))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_no_rank_waits_for_one_that_cannot_write(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    with pytest.raises(ProcessRaisedException, match="text_cache: .* could not be written: "):
        fit(tmp_path, build(), data(pictures, text_cache=cache), devices=2, strategy="ddp_fork", plugins=[])
