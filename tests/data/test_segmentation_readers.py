"""VOC, Pascal Context and COCO-Object on tiny copies of their layouts, and what is said of broken ones."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jrl.data.readers import (
    SEGMENTATION_FORMATS,
    FormatError,
    coco,
    read_coco_object,
    read_pascal_context,
    read_voc,
)
from jrl.data.readers.masks import MASK_MISSING
from tests.data.fixtures import write_coco_object, write_pascal


def test_voc_and_context_yield_pictures_with_class_masks(tmp_path: Path) -> None:
    for name, read, classes in (("voc", read_voc, 21), ("context", read_pascal_context, 60)):
        masks = write_pascal(tmp_path / name, name)
        for root in (tmp_path / name, next((tmp_path / name / "VOCdevkit").iterdir())):
            found = read(root)
            assert SEGMENTATION_FORMATS[name](root).classes == found.classes
            assert len(found.classes) == len(set(found.classes)) == classes
            assert found.classes[0] == "background"
            assert [sample.key for sample in found.samples] == list(masks) == ["a", "b"]
            for sample in found.samples:
                assert sample.split == "val" and not sample.captions
                mask = sample.load_mask()
                assert mask.dtype == np.uint8 and np.array_equal(mask, masks[sample.key])
    assert read_voc(tmp_path / "voc").classes[15] == "person"
    context = read_pascal_context(tmp_path / "context").classes
    # the numbers of the conversion follow the names of the full set, where "plant" is "pottedplant" and "monitor" "tvmonitor"
    original = [
        {"airplane": "aeroplane", "plant": "pottedplant", "monitor": "tvmonitor"}.get(n, n)
        for n in context[1:]
    ]
    assert original == sorted(original)


def test_coco_objects_lie_over_each_other_by_size(tmp_path: Path) -> None:
    write_coco_object(tmp_path)
    found = read_coco_object(tmp_path)
    assert found.classes == ("background", "person", "dog", "toothbrush")
    first, empty = found.samples
    mask = first.load_mask()
    assert mask.dtype == np.uint8 and mask.shape == (10, 12)
    # category 18 is the second by id; the small toothbrush lies on the large dog, and on the crowd too
    assert (mask[2:4, 2:4] == 3).all() and mask[6, 2] == 2 and mask[1, 1] == 2
    assert (mask[8:, 9:] == 255).all() and mask[0, 11] == 0
    assert set(np.unique(mask)) == {0, 2, 3, 255}
    assert not empty.load_mask().any() and empty.load_mask().shape == (6, 8)
    assert not first.objects
    shutil.move(tmp_path / "val2017", tmp_path / "images" / "val2017")
    assert [sample.key for sample in read_coco_object(tmp_path).samples] == ["one.png", "two.png"]


def test_what_is_missing_is_counted_and_what_is_wrong_is_named(tmp_path: Path) -> None:
    masks = write_pascal(tmp_path, "voc")
    home = tmp_path / "VOCdevkit" / "VOC2012"
    (home / "SegmentationClass" / "b.png").unlink()
    with open(home / "ImageSets" / "Segmentation" / "val.txt", "a", encoding="utf-8") as file:
        file.write("gone\n\n../a\n")
    found = read_voc(tmp_path)
    assert [sample.key for sample in found.samples] == ["a"] and len(masks) == 2
    assert found.samples.skips.counts[MASK_MISSING] == 1 and found.samples.skips.skipped == 3
    path = home / "SegmentationClass" / "a.png"
    (sample,) = found.samples
    for picture, words in (
        (Image.fromarray(np.full((4, 4), 21, np.uint8)), "below 21 or 255, got 21"),
        (Image.new("RGB", (4, 4)), "mode RGB"),
    ):
        picture.save(path)
        with pytest.raises(ValueError, match=words) as caught:
            sample.load_mask()
        assert "a.png" in str(caught.value)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png: cannot read the mask"):
        sample.load_mask()


@pytest.mark.parametrize(
    ("build", "kind", "words"),
    [
        (lambda f: read_voc(f / "nowhere"), FileNotFoundError, "root"),
        (lambda f: read_voc(f), FileNotFoundError, r"ImageSets/Segmentation/val\.txt"),
        (lambda f: read_pascal_context(f, split="test"), FileNotFoundError, r"SegmentationContext/test\.txt"),
        (lambda f: read_coco_object(f), FileNotFoundError, r"instances_val2017\.json"),
        (lambda f: read_coco_object(captions(f)), FormatError, "COCO instances"),
        (lambda f: read_coco_object(twins(f)), ValueError, "name of its own"),
        (lambda f: read_voc(emptied(f)), ValueError, "image file missing: 2"),
    ],
)
def test_errors(tmp_path: Path, build: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        build(tmp_path)


def captions(folder: Path) -> Path:
    (folder / "annotations").mkdir()
    document = {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    return folder


def twins(folder: Path) -> Path:
    write_coco_object(folder)
    path = folder / "annotations" / "instances_val2017.json"
    document = json.loads(path.read_text())
    document["categories"][0]["name"] = "dog"
    path.write_text(json.dumps(document))
    return folder


def emptied(folder: Path) -> Path:
    write_pascal(folder, "voc")
    for picture in (folder / "VOCdevkit" / "VOC2012" / "JPEGImages").iterdir():
        picture.unlink()
    return folder


class Pycocotools:
    """As much of `pycocotools.mask` as polygons need, filling their boxes; the module itself is tried where it is installed."""

    @staticmethod
    def frPyObjects(polygons: list[list[float]], height: int, width: int) -> list[np.ndarray]:
        masks = []
        for polygon in polygons:
            mask = np.zeros((height, width), np.uint8)
            (left, right), (top, bottom) = (
                (round(min(own)), round(max(own))) for own in (polygon[::2], polygon[1::2])
            )
            mask[top:bottom, left:right] = 1
            masks.append(mask)
        return masks

    @staticmethod
    def merge(masks: list[np.ndarray]) -> np.ndarray:
        return np.maximum.reduce(masks)

    @staticmethod
    def decode(mask: np.ndarray) -> np.ndarray:
        return mask


@pytest.mark.parametrize(
    "module", [Pycocotools, importlib.util.find_spec("pycocotools") and "pycocotools.mask"]
)
def test_polygons_are_drawn_by_pycocotools_where_it_is_installed(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module is None:
        pytest.skip("pycocotools is not installed")
    found = importlib.import_module(module) if isinstance(module, str) else module
    monkeypatch.setattr(coco, "_pycocotools", lambda: found)
    two = [[2, 1, 6, 1, 6, 4, 2, 4], [7, 5, 9, 5, 9, 7, 7, 7]]
    mask = coco.CocoMask(8, 12, [(5, two)], "k")()
    expected = np.zeros((8, 12), np.int32)
    expected[1:4, 2:6] = expected[5:7, 7:9] = 5
    assert np.array_equal(mask, expected)
    # Pillow counts the pixels of the far border too
    monkeypatch.setattr(coco, "_pycocotools", lambda: None)
    pillow = coco.CocoMask(8, 12, [(5, two)], "k")()
    assert (pillow[expected > 0] == 5).all() and (pillow > 0).sum() > (expected > 0).sum()
