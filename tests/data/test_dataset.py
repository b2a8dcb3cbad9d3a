"""Batches of tensors: reproducible, honest about bad pictures, and a view for retrieval."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from jrl.data import (
    Augment,
    CaptionDataset,
    ImageError,
    ImageTransform,
    RetrievalView,
    Sample,
    SampleSet,
    collate,
    drop_unreadable,
)
from tests.data.fixtures import WordTokenizer, bomb_png, encoded, picture, truncated_jpeg

AUGMENT = Augment(scale=(0.3, 1.0), flip=0.5, translate=0.2, brightness=0.2)


def noise(number: int) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return encoded(PIL.Image.fromarray(values), "PNG")


def good(count: int) -> list[Sample]:
    words = ["a", "bb ccc", "d e f", "gggg"]
    return [
        Sample(
            f"k{number}",
            noise(number),
            words[: 1 + number % 4],
            languages=["en", "de", "en", "fr"][: 1 + number % 4],
        )
        for number in range(count)
    ]


def bad(key: str, data: bytes | Path) -> Sample:
    return Sample(key, data, ["caption"])


def dataset(samples: Any, **options: Any) -> CaptionDataset:
    return CaptionDataset(samples, ImageTransform(8, augment=AUGMENT), WordTokenizer(), **options)


def test_an_item_is_complete() -> None:
    item = dataset(good(3), captions="first")[2]
    assert item["image"].shape == (3, 8, 8)
    assert item["image"].dtype == torch.float32
    assert item["input_ids"].tolist() == [1, 1, 2]
    assert item["attention_mask"].tolist() == [1, 1, 1]
    assert (item["caption"], item["key"], item["index"], item["image_index"]) == ("a", "k2", 2, 2)
    without = CaptionDataset(good(1), ImageTransform(8))[0]
    assert "input_ids" not in without
    last = dataset(good(3), captions="first")[-1]
    assert last["index"] == 2
    for index in (3, -4):
        with pytest.raises(IndexError, match="out of range for 3 items"):
            dataset(good(3))[index]


def batches(source: CaptionDataset, workers: int, **options: Any) -> list[dict[str, Any]]:
    return list(DataLoader(source, batch_size=5, num_workers=workers, collate_fn=source.collate, **options))


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    return all(
        torch.equal(one["image"], other["image"]) and one["caption"] == other["caption"]
        for one, other in zip(first, second, strict=True)
    )


def test_items_depend_on_seed_epoch_and_index_alone() -> None:
    one, two = dataset(good(12), seed=7), dataset(good(12), seed=7)
    plain = batches(one, 0)
    assert same(plain, batches(one, 2))
    assert same(
        plain,
        [two.collate([two[index] for index in chunk]) for chunk in ([0, 1, 2, 3, 4], range(5, 10), [10, 11])],
    )
    two.set_epoch(1)
    assert two.epoch == 1
    assert not same(plain, batches(two, 0))
    assert not same(plain, batches(dataset(good(12), seed=8), 0))


def test_a_new_epoch_reaches_persistent_workers() -> None:
    source = dataset(good(10))
    loader = DataLoader(
        source, batch_size=5, num_workers=2, collate_fn=source.collate, persistent_workers=True
    )
    first = list(loader)
    source.set_epoch(3)
    second = list(loader)
    assert not same(first, second)
    assert same(second, batches(source, 0))


def test_random_captions_visit_all_and_first_does_not() -> None:
    source = dataset(good(4))
    seen = set()
    for epoch in range(60):
        source.set_epoch(epoch)
        seen.add(source[3]["caption"])
    assert seen == {"a", "bb ccc", "d e f", "gggg"}
    first = dataset(good(4), captions="first")
    for epoch in range(5):
        first.set_epoch(epoch)
        assert first[3]["caption"] == "a"


def test_all_captions_are_enumerated() -> None:
    source = dataset(good(4), captions="all")
    assert len(source) == 10
    found = [(item["image_index"], item["caption"]) for item in (source[index] for index in range(10))]
    assert found[3:6] == [(2, "a"), (2, "bb ccc"), (2, "d e f")]


def test_collate_pads_with_the_tokenizers_token() -> None:
    source = dataset(good(4), captions="all")
    batch = source.collate([source[0], source[5]])
    assert batch["input_ids"].tolist() == [[1, 1, 2, 99, 99], [1, 1, 1, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["index"].dtype == torch.int64
    assert batch["key"] == ["k0", "k2"]
    assert collate([source[0], source[5]])["input_ids"][0].tolist() == [1, 1, 2, 0, 0]
    with pytest.raises(ValueError, match="items must hold at least one item"):
        collate([])


def test_max_length_reaches_the_tokenizer() -> None:
    assert dataset(good(4), captions="all", max_length=3)[5]["input_ids"].tolist() == [1, 1, 1]


class _WrongTokenizer:
    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        return {"input_ids": [[1, 2]]}


def test_a_tokenizer_that_returns_lists_is_refused() -> None:
    with pytest.raises(TypeError, match=r"tokenizer must return a tensor \[1, T\] as 'input_ids', got list"):
        CaptionDataset(good(1), ImageTransform(8), _WrongTokenizer())[0]


def test_a_transformers_tokenizer_works(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[PAD]": 3, "[UNK]": 0, "a": 1, "bb": 2}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    source = CaptionDataset(good(4), ImageTransform(8), fast, captions="all", max_length=2)
    batch = source.collate([source[0], source[4], source[5]])
    assert batch["input_ids"].tolist() == [[1, 3], [2, 0], [0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1], [1, 1]]


@pytest.fixture
def mixed(tmp_path: Path) -> list[Sample]:
    (tmp_path / "zero.png").write_bytes(b"")
    spoiled = [
        bad("cut", truncated_jpeg()),
        bad("bomb", bomb_png()),
        bad("gone", tmp_path / "gone.png"),
        bad("zero", tmp_path / "zero.png"),
    ]
    return [*good(8), *spoiled]


@pytest.mark.filterwarnings("ignore:.*another picture takes its place")
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_replaced_and_counted_once(mixed: list[Sample], workers: int) -> None:
    source = dataset(mixed)
    first = batches(source, workers)
    source.set_epoch(1)
    batches(source, workers)
    assert source.skips.counts == {
        "image unreadable": 1,
        "image too large": 1,
        "image file missing": 1,
        "image file empty": 1,
    }
    assert "cut" in source.skips.summary()
    indices = torch.cat([batch["image_index"] for batch in first])
    assert indices[:8].tolist() == list(range(8))
    assert all(index < 8 for index in indices.tolist())
    assert indices[11] == 0
    assert torch.cat([batch["index"] for batch in first]).tolist() == list(range(12))
    again = dataset(mixed)
    assert [again[index]["image_index"] for index in (11, 10, 9, 8)] == indices[[11, 10, 9, 8]].tolist()


def test_the_first_replacement_warns(mixed: list[Sample]) -> None:
    with pytest.warns(UserWarning, match="gone.png.*no such file; another picture takes its place"):
        dataset(mixed)[10]


def test_evaluation_and_raise_do_not_replace(mixed: list[Sample]) -> None:
    with pytest.raises(ImageError, match="cut"):
        dataset(mixed, on_bad_image="raise")[8]
    everything = dataset(mixed, captions="all")
    with pytest.raises(ImageError, match="zero.png"):
        everything[len(everything) - 1]
    with pytest.raises(ValueError, match="on_bad_image='replace' would falsify an evaluation"):
        dataset(mixed, captions="all", on_bad_image="replace")


@pytest.mark.filterwarnings("ignore:.*another picture takes its place")
def test_too_many_bad_pictures_stop_the_training(tmp_path: Path) -> None:
    samples = [*good(40), *(bad(f"b{number}", tmp_path / f"{number}.png") for number in range(60))]
    source = dataset(samples)
    with pytest.raises(
        ImageError, match=r"\d+ of \d+ pictures tried cannot be used, more than max_bad_fraction=0.5"
    ):
        [source[index] for index in range(100)]
    tolerant = dataset(samples, max_bad_fraction=0.7)
    for index in range(100):
        tolerant[index]
    assert tolerant.skips.skipped == 60
    with pytest.raises(ImageError, match="1 of 1 pictures tried"):
        dataset([bad("only", b"junk")])[0]


def test_the_size_limit_reaches_the_decoder() -> None:
    with pytest.raises(ImageError, match="max_pixels=100"):
        dataset(good(1), max_pixels=100, on_bad_image="raise")[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"captions": "some"}, "captions must be 'random', 'first' or 'all', got 'some'"),
        ({"on_bad_image": "skip"}, "on_bad_image must be 'replace' or 'raise'"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction must lie in"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataset(good(2), **options)


def test_samples_are_checked() -> None:
    with pytest.raises(ValueError, match="at least one sample, got none"):
        dataset([])
    with pytest.raises(ValueError, match="samples: 'x' has no caption"):
        dataset([*good(1), Sample("x", noise(0), [])])
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        dataset(good(1)).set_epoch(-1)


def test_drop_unreadable_counts_and_names(mixed: list[Sample]) -> None:
    kept = drop_unreadable(SampleSet(mixed, name="toy"))
    assert len(kept) == 8
    assert kept.name == "toy"
    assert kept.skips.skipped == 4
    assert "gone.png" in kept.skips.summary()
    with pytest.raises(ValueError, match="no usable sample; 4 skipped"):
        drop_unreadable(mixed[8:])


def test_retrieval_view_maps_captions_to_pictures() -> None:
    view = RetrievalView(good(4), ImageTransform(8), WordTokenizer())
    assert len(view.images) == 4
    assert len(view.captions) == 10
    assert view.caption_to_image.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert view.caption_to_image.dtype == torch.int64
    item = view.images[3]
    assert (item["key"], item["index"], tuple(item["image"].shape)) == ("k3", 3, (3, 8, 8))
    text = view.captions[9]
    assert (text["caption"], text["index"]) == ("gggg", 9)
    batch = view.captions.collate([view.captions[0], view.captions[5]])
    assert batch["input_ids"].tolist() == [[1, 1, 2, 99, 99], [1, 1, 1, 1, 2]]
    assert view.images.collate([view.images[0]])["image"].shape == (1, 3, 8, 8)
    assert len(pickle.loads(pickle.dumps(view)).captions) == 10


def test_retrieval_view_by_language_and_number() -> None:
    german = RetrievalView(good(4), ImageTransform(8), WordTokenizer(), language="de")
    assert german.caption_to_image.tolist() == [0, 1, 2]
    assert [sample.key for sample in german.samples] == ["k1", "k2", "k3"]
    assert german.skips.counts == {"no caption in de": 1}
    two = RetrievalView(good(4), ImageTransform(8), WordTokenizer(), captions_per_image=2, max_length=2)
    assert two.caption_to_image.tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert two.captions[0]["input_ids"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="no usable sample; 4 skipped"):
        RetrievalView(good(4), ImageTransform(8), WordTokenizer(), language="ja")
    with pytest.raises(ValueError, match="captions_per_image must be positive"):
        RetrievalView(good(4), ImageTransform(8), WordTokenizer(), captions_per_image=0)


def test_retrieval_view_names_a_bad_picture(mixed: list[Sample]) -> None:
    view = RetrievalView(mixed, ImageTransform(8), WordTokenizer())
    with pytest.raises(ImageError, match="gone.png"):
        view.images[10]


def test_a_function_as_picture_is_opened_at_each_visit() -> None:
    opened = []

    def draw() -> PIL.Image.Image:
        opened.append(1)
        return picture()

    source = dataset([Sample("drawn", draw, ["caption"])])
    assert not opened
    source[0]
    source[0]
    assert len(opened) == 2
