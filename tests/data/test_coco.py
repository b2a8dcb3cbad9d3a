"""COCO captions, instances and Karpathy splits in their true form."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrl.data.readers import FormatError, read_coco, read_karpathy
from jrl.data.readers.coco import CocoMask
from tests.data.fixtures import (
    coco_captions,
    coco_document,
    coco_image,
    coco_instances,
    karpathy_document,
    narrative,
    write_json,
    write_pictures,
)

NAMES = ("000000000139.jpg", "000000000285.jpg", "000000000724.jpg")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "val2017", *NAMES)
    write_json(tmp_path / "captions_val2017.json", coco_captions())
    return tmp_path


def test_captions_are_gathered_by_picture(coco: Path) -> None:
    samples = read_coco(coco / "captions_val2017.json", coco / "val2017", split="val")
    assert [sample.key for sample in samples] == list(NAMES[:2])
    first = samples[0]
    assert first.captions == [
        "A woman stands in the dining area at the table.",
        "A room with chairs, a table, and a café sign.",
    ]
    assert first.languages == ["en", "en"]
    assert first.split == "val"
    assert first.metadata == {"image_id": 139, "annotation_ids": [182, 185]}
    assert samples.skips.counts == {"image file missing": 1, "no caption": 1}
    assert "000000000632.jpg" in samples.skips.summary()
    assert samples.name == "captions_val2017"


def test_a_byte_order_mark_and_the_folder_above_are_fine(coco: Path) -> None:
    path = write_json(coco / "bom.json", coco_captions(), bom=True)
    assert len(read_coco(path, coco)) == 2


def test_unusable_entries_are_counted(coco: Path) -> None:
    document = coco_captions()
    document["images"] += [{"id": 1}, coco_image(2, "../val2017/000000000139.jpg"), "x"]
    document["annotations"] += [
        {"image_id": 285, "id": 1, "caption": "  "},
        {"image_id": 285, "id": 2, "caption": None},
        {"image_id": 777, "id": 3, "caption": "of no picture"},
        {"id": 4, "caption": "of nothing"},
    ]
    samples = read_coco(write_json(coco / "odd.json", document), coco / "val2017")
    assert samples.skips.counts == {
        "malformed row": 3,
        "image path outside the image folder": 1,
        "image file missing": 1,
        "no caption": 1,
        "annotation of an unknown image": 1,
    }
    assert samples.skips.notes == {"empty caption dropped": 2}
    assert len(samples) == 2


def test_the_same_file_twice_keeps_distinct_keys(coco: Path) -> None:
    document = coco_captions()
    document["images"].append(coco_image(999, NAMES[0]))
    document["annotations"].append({"image_id": 999, "id": 5, "caption": "again"})
    samples = read_coco(write_json(coco / "twice.json", document), coco / "val2017")
    assert [sample.key for sample in samples] == [NAMES[0], NAMES[1], f"{NAMES[0]}#2"]
    assert samples.skips.notes == {"repeated key renamed": 1}


def test_instances_give_boxes_and_lazy_masks(coco: Path) -> None:
    path = write_json(coco / "instances_val2017.json", coco_instances())
    samples = read_coco(coco / "captions_val2017.json", coco / "val2017", instances=path)
    chair, crowd = samples[0].objects
    assert (chair.label, chair.box, chair.attributes, chair.mask_id) == ("chair", (1, 1, 6, 6), (), 1)
    assert (crowd.label, crowd.box, crowd.attributes, crowd.mask_id) == (
        "person",
        (8, 0, 12, 8),
        ("crowd",),
        2,
    )
    assert samples.skips.notes["object with an empty or broken box dropped"] == 1
    mask = pickle.loads(pickle.dumps(samples[0])).load_mask()
    assert mask.shape == (8, 12)
    assert (mask[:, 8:] == 2).all()
    assert (mask[2:6, 2:6] == 1).all()
    assert (mask[7, :8] == 0).all()
    assert samples[1].load_mask() is None
    assert samples[1].objects == []


def test_instances_with_odd_categories_and_boxes(coco: Path) -> None:
    document = coco_instances()
    first, second, third = document["annotations"]
    first["category_id"], second["category_id"] = 99, [1]
    third["bbox"] = [0, 0, float("inf"), 2]
    path = write_json(coco / "instances_val2017.json", document)
    samples = read_coco(coco / "captions_val2017.json", coco / "val2017", instances=path)
    assert [thing.label for thing in samples[0].objects] == ["99", "[1]"]
    assert samples.skips.notes == {
        "object of an unknown category labelled by its id": 2,
        "object with an empty or broken box dropped": 1,
    }
    for categories in (None, [1], [{"id": [1], "name": "x"}], [{"id": 1}]):
        document["categories"] = categories
        write_json(path, document)
        with pytest.raises(FormatError, match="instances_val2017.json: .*'categories' of 'id' and 'name'"):
            read_coco(coco / "captions_val2017.json", coco / "val2017", instances=path)


def test_small_objects_lie_over_large_ones() -> None:
    whole = {"counts": [0, 96], "size": [8, 12]}
    small = {"counts": [0, 4, 92], "size": [8, 12]}
    mask = CocoMask(8, 12, [(1, small), (2, whole)], "k")()
    assert mask[:4, 0].tolist() == [1, 1, 1, 1]
    assert mask[4:, 0].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[1, 2, 3, 4]], "at least 3 corners"),
        ([[1, 2, 3, 4, 5, None]], "at least 3 corners"),
        ({"counts": 7, "size": [8, 12]}, "'counts'"),
        ({"counts": [5], "size": [8, 12]}, "add up to 8x12"),
        ({"counts": [96], "size": [12, 8]}, r"'size' \[8, 12\]"),
        ({"size": [8, 12]}, "'counts'"),
        ("nonsense", "run lengths need"),
    ],
)
def test_broken_segmentations_name_the_sample(segmentation: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        CocoMask(8, 12, [(1, segmentation)], "000000000139.jpg")()
    assert "000000000139.jpg" in str(caught.value)
    with pytest.raises(ValueError, match="'height' and 'width'"):
        CocoMask(None, 12, [(1, segmentation)], "k")()
    for height in (-8, 0, 10**8):
        with pytest.raises(ValueError, match=f"pixels, got {height}x12"):
            CocoMask(height, 12, [(1, segmentation)], "k")()


def test_compressed_run_lengths_say_what_to_install() -> None:
    mask = CocoMask(8, 12, [(1, {"counts": "P3", "size": [8, 12]})], "k")
    if importlib.util.find_spec("pycocotools") is None:
        with pytest.raises(ModuleNotFoundError, match="pip install pycocotools"):
            mask()
    else:
        assert not mask().any()


def test_other_formats_are_recognised(coco: Path) -> None:
    folder = coco / "val2017"
    cases: dict[str, Any] = {
        "a Karpathy split": karpathy_document(),
        "COCO instances": coco_instances(),
        "COCO image information without annotations": {"images": [coco_image(1, "a.jpg")]},
        "Localized Narratives": narrative("139", "In this picture"),
    }
    for words, document in cases.items():
        with pytest.raises(FormatError, match=f"other.json: expected COCO captions.*looks like.*{words}"):
            read_coco(write_json(coco / "other.json", document), folder)
    texts = {
        "Flickr30k tokens": b"1000092795.jpg#0\tTwo young guys.\n",
        "a CC3M TSV": b"a picture\thttps://example.org/a.jpg\n",
        "a CC12M TSV": b"https://example.org/a.jpg\ta picture\n",
        "an open_clip CSV": b"filepath\ttitle\na.jpg\ta picture\n",
        "a picture": (folder / NAMES[0]).read_bytes(),
    }
    for words, data in texts.items():
        (coco / "other.json").write_bytes(data)
        with pytest.raises(FormatError, match=f"other.json: expected COCO captions.*looks like {words}"):
            read_coco(coco / "other.json", folder)


def test_damaged_and_missing_files_are_named(coco: Path) -> None:
    folder = coco / "val2017"
    with pytest.raises(FileNotFoundError, match=r"annotations: .*gone.json: no such file"):
        read_coco(coco / "gone.json", folder)
    with pytest.raises(FileNotFoundError, match=r"images: .*gone: no such folder"):
        read_coco(coco / "captions_val2017.json", coco / "gone")
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder"):
        read_coco(coco / "captions_val2017.json", coco / "captions_val2017.json")
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        read_coco(coco, folder)
    damaged = {
        b"": "is empty",
        b'{"images": [': "not JSON at line 1, column 13",
        b'{"images": "\xff"}': "not UTF-8 at byte 12",
        "{}".encode("utf-16"): "UTF-16, expected UTF-8",
        b"[" * 100_000: "nested too deeply|not JSON",
        b"[1, 2]": "expected COCO captions",
    }
    for data, words in damaged.items():
        (coco / "bad.json").write_bytes(data)
        with pytest.raises(FormatError, match=words) as caught:
            read_coco(coco / "bad.json", folder)
        assert "bad.json" in str(caught.value)
    with pytest.raises(FormatError, match="'annotations' is empty"):
        read_coco(write_json(coco / "bad.json", coco_document([], [])), folder)


def test_nothing_usable_is_an_error_with_the_reasons(coco: Path) -> None:
    (coco / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no usable sample; 4 skipped\n +image file missing: 4"):
        read_coco(coco / "captions_val2017.json", coco / "empty")


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    document = karpathy_document()
    write_pictures(tmp_path, *(f"{image['filepath']}/{image['filename']}" for image in document["images"]))
    write_json(tmp_path / "dataset_coco.json", document)
    return tmp_path


def test_restval_is_training(karpathy: Path) -> None:
    samples = read_karpathy(karpathy / "dataset_coco.json", karpathy)
    assert samples.splits == {"test": 1, "train": 2, "val": 1}
    train = read_karpathy(karpathy / "dataset_coco.json", karpathy, split="train")
    assert [sample.key for sample in train] == [
        "COCO_val2014_000000060623.jpg",
        "COCO_train2014_000000318556.jpg",
    ]
    test = samples.select("test")
    assert test[0].captions == ["A man with a red helmet.", "A man."]
    assert test[0].metadata == {"imgid": 0, "cocoid": 391_000, "sentids": [0, 1]}
    with pytest.raises(ValueError, match="split must be one of .*'train', 'val'.*got 'restval'"):
        read_karpathy(karpathy / "dataset_coco.json", karpathy, split="restval")


def test_karpathy_without_filepath_and_with_defects(tmp_path: Path) -> None:
    document = karpathy_document()
    for image in document["images"]:
        del image["filepath"]
    document["images"][2]["sentences"] = []
    document["images"][3] = {"split": "val"}
    names = [image["filename"] for image in document["images"][:3]]
    samples = read_karpathy(
        write_json(tmp_path / "dataset_flickr8k.json", document),
        write_pictures(tmp_path / "flat", *names[1:]),
    )
    assert [sample.key for sample in samples] == names[1:2]
    assert samples.skips.counts == {"image file missing": 1, "no caption": 1, "malformed row": 1}


def test_karpathy_refuses_coco(karpathy: Path) -> None:
    path = write_json(karpathy / "captions.json", coco_captions())
    with pytest.raises(
        FormatError, match=r"expected a Karpathy split.*looks like COCO captions \(format 'coco'\)"
    ):
        read_karpathy(path, karpathy)


def test_a_mask_array_of_the_wrong_kind_is_refused(coco: Path) -> None:
    sample = read_coco(coco / "captions_val2017.json", coco / "val2017")[0]
    sample.mask = np.zeros((2, 2, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"mask must be integers \[H, W\], got uint8 \[2, 2, 3\]"):
        sample.load_mask()
    sample.mask = coco / "captions_val2017.json"
    with pytest.raises(ValueError, match="cannot read mask .*captions_val2017.json"):
        sample.load_mask()
