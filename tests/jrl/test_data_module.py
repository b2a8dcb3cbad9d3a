"""The data module: parts, captions, what is skipped and what is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from jrl.data.images import Augment
from jrl.data.nouns import PromptOptions
from jrl.data.sample import Sample, SampleSet, SkipReport
from jrl.training import CaptionDataModule
from jrl.training import data as data_module
from jrl.training.captions import CaptionMix, Captions, with_captions


def module(root: Path, **options: Any) -> CaptionDataModule:
    values: dict[str, Any] = {
        "dataset": "folder",
        "options": {"root": str(root)},
        "image_size": 32,
        "batch_size": 8,
        "eval_batch_size": 5,
        "vocab_size": 300,
        "val_fraction": 0.2,
        "augment": Augment(),
    }
    return CaptionDataModule(**{**values, **options})


def test_parts_are_disjoint_and_stable(pictures: Path) -> None:
    one, other = module(pictures), module(pictures)
    one.setup("fit")
    other.setup("fit")
    train, val = one.samples("train"), one.samples("val")
    assert len(train) + len(val) == 48
    assert {s.key for s in train}.isdisjoint(s.key for s in val)
    assert [s.key for s in other.samples("val")] == [s.key for s in val]
    with pytest.raises(ValueError, match="expected one of train, val"):
        one.samples("test")


def test_another_vocabulary_is_refused_on_resume(pictures: Path) -> None:
    first = module(pictures)
    first.setup("fit")
    first.train_dataloader()
    same, other = module(pictures), module(pictures, vocab_size=290)
    for data in (same, other):
        data.setup("fit")
        data.load_state_dict(first.state_dict())
    same.train_dataloader()
    with pytest.raises(ValueError, match="another vocabulary than the run that stopped"):
        other.train_dataloader()


@pytest.mark.parametrize("in_memory", [True, False])
def test_evaluation_batches_hold_every_picture_and_caption(pictures: Path, in_memory: bool) -> None:
    data = module(pictures, in_memory=in_memory)
    data.setup("validate")
    (loader,) = data.val_dataloader()
    assert loader.name == "val"
    batches = list(loader)
    assert len(batches) == len(loader)
    index = torch.cat([batch["image_index"] for batch in batches])
    assert index.tolist() == list(range(len(data.samples("val"))))
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    assert pixels.shape == (len(index), 3, 32, 32)
    expected = torch.stack(
        [data.transform(Image.open(str(s.image)).convert("RGB")) for s in data.samples("val")]
    )
    assert torch.allclose(pixels, expected, atol=1e-5)
    assert data.tokenizer is not None
    texts = [
        data.tokenizer.decode(row, skip_special_tokens=True).strip()
        for batch in batches
        for row in batch["input_ids"]
    ]
    assert texts == [s.captions[0] for s in data.samples("val")]


def test_training_batches_repeat_and_differ_by_epoch(pictures: Path) -> None:
    data = module(pictures)
    data.setup("fit")

    def epochs() -> list[list[Tensor]]:
        loader = data.train_dataloader()
        return [[batch["pixel_values"] for batch in loader] for _ in range(2)]

    first, again = epochs(), epochs()
    assert all(
        torch.equal(a, b)
        for one, two in zip(first, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert not torch.equal(first[0][0], first[1][0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_pictures_are_counted_and_named(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_memory: bool
) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    broken = sorted(root.glob("*.png"))[::6]
    for path in broken:
        path.write_bytes(path.read_bytes()[:70])
    data = module(root, in_memory=in_memory)
    data.setup("fit")
    seen = {"train": 0, "val": 0}
    for batch in data.train_dataloader():
        assert len(batch["pixel_values"]) == len(batch["input_ids"])
    for batch in data.val_dataloader()[0]:
        seen["val"] += len(batch["pixel_values"])
        assert set(batch["caption_image"].tolist()) == set(batch["image_index"].tolist())
    data.teardown("fit")
    report = capsys.readouterr().err
    lost = sum(sample.image in broken for sample in data.samples("val"))
    assert seen["val"] == len(data.samples("val")) - lost
    assert f"{lost} skipped" in report
    assert any(path.name in report for path in broken)


def test_a_batch_without_a_readable_picture_stops(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    for path in root.glob("*.png"):
        path.write_bytes(path.read_bytes()[:70])
    for in_memory in (True, False):
        data = module(root, in_memory=in_memory)
        data.setup("fit")
        with pytest.raises(ValueError, match="read|usable"):
            list(data.train_dataloader())


def test_several_captions_and_languages() -> None:
    samples = [
        Sample("a", Path("a"), ["red", "rouge", "rot"], ["en", "fr", "de"]),
        Sample("b", Path("b"), ["bleu"], ["fr"]),
    ]
    skips = SkipReport()
    kept, captions = with_captions(samples, ["en", "de"], skips)
    assert [sample.key for sample in kept] == ["a"]
    assert captions == [["red", "rot"]]
    assert skips.skipped == 1
    assert with_captions(samples, None, SkipReport())[1] == [["red", "rouge", "rot"], ["bleu"]]


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, texts: list[str], *, max_length: int, **_: Any) -> dict[str, Tensor]:
        rows = [[ord(letter) for letter in text][:max_length] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def spelled(batch: dict[str, Any]) -> list[str]:
    return ["".join(chr(i) for i in row if i) for row in batch["input_ids"].tolist()]


def test_one_each_draws_every_caption_and_all_of_lists_them() -> None:
    captions = Captions([["a", "bb", "ccc"], ["dd"]], Letters(), 8)
    drawn = Counter(spelled(captions.one_each(torch.tensor([0]), seed))[0] for seed in range(90))
    assert set(drawn) == {"a", "bb", "ccc"}
    assert min(drawn.values()) > 15
    assert spelled(captions.one_each(torch.tensor([1, 1]), 0)) == ["dd", "dd"]
    batch = captions.all_of(torch.tensor([1, 0]))
    assert spelled(batch) == ["dd", "a", "bb", "ccc"]
    assert batch["caption_image"].tolist() == [1, 0, 0, 0]
    assert spelled(captions.one_each(torch.tensor([0, 1]), 5)) == spelled(
        captions.one_each(torch.tensor([0, 1]), 5)
    )


def test_padding_is_trimmed_to_the_batch() -> None:
    captions = Captions([["a"], ["bbbbbb"]], Letters(), 8)
    assert captions.one_each(torch.tensor([0, 0]), 0)["input_ids"].shape == (2, 1)
    assert captions.one_each(torch.tensor([1]), 0)["input_ids"].shape == (1, 6)


@pytest.mark.parametrize(
    ("mix", "check"),
    [
        (CaptionMix(1, 0, 0, 0), lambda text: text == "red"),
        (CaptionMix(0, 0, 0, 1), lambda text: text in {"rot", "rouge"}),
        (
            CaptionMix(0, 0, 1, 0),
            lambda text: set(text.split(", ")) <= set("uvwxyz") and text.count(",") >= 1,
        ),
        (CaptionMix(0, 1, 0, 0), lambda text: "red" in text.split(", ") and 2 <= len(text.split(", ")) <= 5),
    ],
)
def test_each_way_of_the_mix(mix: CaptionMix, check: Any) -> None:
    texts = [
        mix.draw(["red", "rot", "rouge"], list("uvwxyz"), np.random.default_rng(seed)) for seed in range(60)
    ]
    assert all(check(text) for text in texts), texts
    assert mix.draw(["red"], [], np.random.default_rng(0)) == "red"
    assert CaptionMix(0, 0, 1, 0).draw(["red"], ["u"], np.random.default_rng(0)) == "red"


def test_mix_reaches_the_batch() -> None:
    captions = Captions([["red", "rot"]], Letters(), 8, CaptionMix(0, 0, 0, 1))
    assert spelled(captions.one_each(torch.tensor([0, 0]), 0)) == ["rot", "rot"]
    with pytest.raises(ValueError, match="caption_mix"):
        CaptionMix(0, 0, 0, 0)


def test_dataset_parts_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGB", (32, 32), "white")
    samples = [
        Sample(f"{part}{i}", picture, [f"word {i}"], split=part)
        for part in ("train", "val", "odd")
        for i in range(9)
    ]
    monkeypatch.setattr(data_module, "_reader", lambda name: lambda: SampleSet(samples, name=name))
    data = CaptionDataModule("made", image_size=32, batch_size=4, vocab_size=300, test_splits=("odd",))
    data.setup("fit")
    assert data.parts == ("train", "val", "odd")
    assert [loader.name for loader in data.val_dataloader()] == ["val"]
    assert [loader.name for loader in data.test_dataloader()] == ["odd"]
    data = CaptionDataModule("made", image_size=32, batch_size=4, vocab_size=300, val_splits=("none",))
    data.setup("fit")
    assert data.val_dataloader() == []
    assert "none" in data.skips.summary()
    with pytest.raises(ValueError, match="test_splits"):
        data.test_dataloader()
    data = CaptionDataModule("made", image_size=32, batch_size=4, vocab_size=300, train_split="fold1")
    with pytest.raises(ValueError, match="train_split"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"batch_size": 0}, "batch_size"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"max_length": 1}, "max_length"),
        ({"workers": -1}, "workers"),
        ({"image_size": 0}, "size"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
    ],
)
def test_refusals(pictures: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module(pictures, **options)


@pytest.mark.parametrize("in_memory", [True, False])
def test_prompts_are_made_of_the_caption_of_the_batch(in_memory: bool) -> None:
    pytest.importorskip("HanTa", reason="the tagger is part of jrl[train]")

    def batches(prompts: PromptOptions | None) -> tuple[CaptionDataModule, list[dict[str, Any]]]:
        parts = {"train": 24, "val": 4, "test": 0, "test_compositional": 0}
        data = CaptionDataModule(
            "scenes",
            {**parts, "size": 16, "languages": ["en"]},
            image_size=16,
            batch_size=8,
            vocab_size=400,
            prompts=prompts,
            in_memory=in_memory,
        )
        data.setup("fit")
        (validation,) = data.val_dataloader()
        assert all("prompt_ids" not in batch for batch in validation)
        return data, list(data.train_dataloader())

    data, made = batches(PromptOptions(count=2, kind="noun_phrase", templates=("this {}",)))
    _, again = batches(PromptOptions(count=2, kind="noun_phrase", templates=("this {}",)))
    _, none = batches(None)
    assert data.tokenizer is not None
    filled = 0
    for batch, same, without in zip(made, again, none, strict=True):
        assert "prompt_ids" not in without
        assert torch.equal(batch["prompt_ids"], same["prompt_ids"])
        assert batch["prompt_ids"].shape == batch["prompt_mask"].shape
        assert batch["prompt_ids"].shape[:2] == (8, 2) and batch["prompt_mask"].dtype == torch.bool
        rows = zip(batch["input_ids"], batch["prompt_ids"], batch["prompt_mask"], strict=True)
        for caption, prompts, mask in rows:
            said = data.tokenizer.decode(caption, skip_special_tokens=True).strip()
            texts = [text.strip() for text in data.tokenizer.batch_decode(prompts, skip_special_tokens=True)]
            assert texts[0] != texts[1]
            for text, real in zip(texts, mask, strict=True):
                assert bool(real.any()) == text.startswith("this ")
                assert text.removeprefix("this ") in said
            filled += int(mask[1].any())
    assert 0 < filled < 24  # some captions have one noun phrase only
    # the template's words, which no caption has, are whole tokens too
    assert len(data.tokenizer("this circle")["input_ids"]) == 4
