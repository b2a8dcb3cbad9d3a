"""COCO captions with their instance boxes and masks, and Karpathy's splits of COCO and Flickr."""

from __future__ import annotations

import importlib
import math
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

from jrl.data.images import MAX_PIXELS
from jrl.data.readers.common import (
    BAD_ROW,
    NO_CAPTION,
    DistinctKeys,
    FormatError,
    ImageFolder,
    clean_captions,
    existing_file,
    read_json,
    recognise_document,
)
from jrl.data.sample import Sample, SampleSet, SceneObject, SkipReport

UNKNOWN_IMAGE = "annotation of an unknown image"
UNKNOWN_CATEGORY = "object of an unknown category labelled by its id"
EMPTY_BOX = "object with an empty or broken box dropped"


def read_coco(
    annotations: str | Path,
    images: str | Path,
    *,
    instances: str | Path | None = None,
    split: str = "",
    language: str = "en",
) -> SampleSet:
    """Read COCO captions: one sample a picture, with all its captions in the order of the file.

    Args:
        annotations: `captions_{train,val}{2014,2017}.json`.
        images: the folder of pictures, or the one above `train2017` and the like.
        instances: `instances_*.json` of the same pictures, for boxes and masks; masks are decoded on demand.
        split: what to call the split.
        language: code of the captions' language.
    Returns:
        Samples keyed by file name; image and annotation ids are in `metadata`.
    Raises:
        FileNotFoundError: a file or the folder is missing.
        FormatError: a file is not of this format; the message says which it looks like.
        ValueError: no picture has both a file and a caption.
    """
    path = existing_file(annotations, "annotations")
    folder, skips = ImageFolder(images), SkipReport()
    keys = DistinctKeys(skips)
    document = load_document(path, "COCO captions", "caption")
    captions = _by_image(path, document, skips)
    objects = None if instances is None else Instances(existing_file(instances, "instances"), skips)

    samples = []
    for position, image in enumerate(document["images"]):
        if not is_image(image):
            skips.add(BAD_ROW, f"{path}: images[{position}] needs 'id' and 'file_name'")
            continue
        name, where = image["file_name"], f"{path}: image {image['id']}"
        found = folder.find_or_skip(skips, where, name, *nested_name(image))
        if found is None:
            continue
        own = captions.pop(image["id"], [])
        texts = clean_captions([entry.get("caption") for entry in own], skips, where)
        if not texts:
            skips.add(NO_CAPTION, f"{where}: {name}")
            continue
        sample = Sample(
            key=keys(name),
            image=found,
            captions=texts,
            languages=[language] * len(texts),
            split=split,
            metadata={"image_id": image["id"], "annotation_ids": [entry.get("id") for entry in own]},
        )
        if objects is not None:
            objects.attach(sample, image)
        samples.append(sample)
    known = {image["id"] for image in document["images"] if is_image(image)}
    for image_id, entries in captions.items():
        if image_id not in known:
            skips.add(UNKNOWN_IMAGE, f"{path}: image_id {image_id}", len(entries))
    skips.raise_if_empty(len(samples), path)
    return SampleSet(samples, name=path.stem, skips=skips)


def is_image(image: Any) -> bool:
    """Whether an entry of "images" has what a reader needs."""
    return (
        isinstance(image, dict)
        and isinstance(image.get("file_name"), str)
        and isinstance(image.get("id"), (int, str))
    )


def _is_category(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("id"), (int, str))
        and isinstance(entry.get("name"), str)
    )


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)
        and box[2] > 0
        and box[3] > 0
    )


def load_document(path: Path, expected: str, field: str) -> dict[str, Any]:
    """Parse a COCO file that has `field` in its annotations; FormatError for another."""
    document = read_json(path, expected)
    if isinstance(document, dict):
        images, annotations = document.get("images"), document.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            if not annotations:
                raise FormatError(f"{path}: expected {expected}: 'annotations' is empty")
            if any(isinstance(entry, dict) and field in entry for entry in annotations):
                return document
    found = recognise_document(document)
    raise FormatError(
        f"{path}: expected {expected} ('images' and 'annotations' with '{field}')"
        + (f"; it looks like {found}" if found else "")
    )


def _by_image(path: Path, document: dict[str, Any], skips: SkipReport) -> dict[Any, list[dict[str, Any]]]:
    grouped: dict[Any, list[dict[str, Any]]] = {}
    for position, entry in enumerate(document["annotations"]):
        if isinstance(entry, dict) and isinstance(entry.get("image_id"), (int, str)):
            grouped.setdefault(entry["image_id"], []).append(entry)
        else:
            skips.add(BAD_ROW, f"{path}: annotations[{position}] needs 'image_id'")
    return grouped


def nested_name(image: dict[str, Any]) -> list[str]:
    """The name below the split's folder, as in the last two parts of `coco_url`."""
    url = image.get("coco_url")
    return ["/".join(PurePosixPath(url).parts[-2:])] if isinstance(url, str) and url.count("/") > 2 else []


class Instances:
    """The objects of an `instances_*.json`.

    Args:
        path: of the file.
        skips: takes an account of broken boxes and unknown categories.

    Attributes:
        document: the parsed file.
        names: of the categories, by id.
    """

    def __init__(self, path: Path, skips: SkipReport) -> None:
        self.document = document = load_document(path, "COCO instances", "bbox")
        self._path = path
        self._skips = skips
        self._by_image = _by_image(path, document, skips)
        categories = document.get("categories")
        if not isinstance(categories, list) or not all(_is_category(entry) for entry in categories):
            raise FormatError(f"{path}: expected COCO instances with 'categories' of 'id' and 'name'")
        self.names: dict[Any, str] = {entry["id"]: entry["name"] for entry in categories}

    def attach(self, sample: Sample, image: dict[str, Any]) -> None:
        """Give a sample the boxes and the mask of a picture."""
        shapes: list[tuple[int, Any]] = []
        for entry in self._by_image.get(image["id"], []):
            where = f"{self._path}: annotation {entry.get('id')}"
            box: Any = entry.get("bbox")
            if not _is_box(box):
                self._skips.note(EMPTY_BOX, f"{where}: {box}")
                continue
            x, y, width, height = (float(value) for value in box)
            segmentation = entry.get("segmentation")
            mask_id = len(sample.objects) + 1 if segmentation else None
            if mask_id is not None:
                shapes.append((mask_id, segmentation))
            category = entry.get("category_id")
            known = isinstance(category, (int, str)) and category in self.names
            if not known:
                self._skips.note(UNKNOWN_CATEGORY, f"{where}: {category}")
            sample.objects.append(
                SceneObject(
                    label=self.names[category] if known else str(category),
                    attributes=("crowd",) if entry.get("iscrowd") else (),
                    box=(x, y, x + width, y + height),
                    mask_id=mask_id,
                )
            )
        if shapes:
            sample.mask = CocoMask(image.get("height"), image.get("width"), shapes, sample.key)


class CocoMask:
    """Decodes COCO segmentations into one map [H, W] of object index + 1; small objects lie over large ones.

    Args:
        height, width: of the picture, in pixels.
        shapes: (value, segmentation) pairs: polygons, or run lengths, as a list or COCO's compressed string. Polygons are
            drawn by pycocotools where it is installed, else by Pillow, whose borders differ by a pixel here and there.
        key: the sample's name in messages.
    """

    def __init__(
        self, height: int | None, width: int | None, shapes: list[tuple[int, Any]], key: str
    ) -> None:
        self.height, self.width, self.shapes, self.key = height, width, shapes, key

    def __call__(self) -> np.ndarray:
        """Return int32 [H, W].

        Raises:
            ValueError: the picture's size is not in the file, or a segmentation is broken.
            ModuleNotFoundError: compressed run lengths, and pycocotools is not installed.
        """
        if not isinstance(self.height, int) or not isinstance(self.width, int):
            raise ValueError(f"{self.key}: masks need 'height' and 'width' of the image in the annotations")
        if min(self.height, self.width) < 1 or self.height * self.width > MAX_PIXELS:
            raise ValueError(
                f"{self.key}: masks need a size of 1 to {MAX_PIXELS} pixels, got {self.height}x{self.width}"
            )
        masks = [(value, self._decode(segmentation)) for value, segmentation in self.shapes]
        combined = np.zeros((self.height, self.width), dtype=np.int32)
        for value, mask in sorted(masks, key=lambda pair: -int(pair[1].sum())):
            combined[mask] = value
        return combined

    def _decode(self, segmentation: Any) -> np.ndarray:
        height, width = self.height or 0, self.width or 0
        coco_mask = _pycocotools()
        if isinstance(segmentation, list):
            for polygon in segmentation:
                if not _is_polygon(polygon):
                    raise ValueError(
                        f"{self.key}: a polygon needs x, y of at least 3 corners, got {str(polygon)[:80]}"
                    )
            if coco_mask is not None:
                shapes = coco_mask.frPyObjects(segmentation, height, width)
                return coco_mask.decode(coco_mask.merge(shapes)).astype(bool)
            canvas = PIL.Image.new("1", (width, height))
            draw = PIL.ImageDraw.Draw(canvas)
            for polygon in segmentation:
                draw.polygon(polygon, fill=1, outline=1)
            return np.array(canvas, dtype=bool)
        counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
        if not isinstance(counts, (list, str, bytes)) or segmentation.get("size") != [height, width]:
            raise ValueError(
                f"{self.key}: run lengths need 'counts' and 'size' [{height}, {width}], "
                f"got {str(segmentation)[:80]}"
            )
        if isinstance(counts, list):
            return _from_runs(counts, height, width, self.key)
        if coco_mask is None:
            raise ModuleNotFoundError(
                f"{self.key}: this mask is compressed run lengths, which pycocotools decodes: "
                "pip install pycocotools"
            )
        return coco_mask.decode(segmentation).astype(bool)


@cache
def _pycocotools() -> Any:
    """The module that draws masks as COCO does; None where it is not installed."""
    try:
        return importlib.import_module("pycocotools.mask")
    except ModuleNotFoundError:
        return None


def _is_polygon(polygon: Any) -> bool:
    return (
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in polygon)
    )


def _from_runs(counts: list[int], height: int, width: int, key: str) -> np.ndarray:
    if any(not isinstance(count, int) or count < 0 for count in counts) or sum(counts) != height * width:
        raise ValueError(f"{key}: run lengths must be non-negative and add up to {height}x{width}")
    # Runs alternate background and object, down the columns first.
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def read_karpathy(
    annotations: str | Path, images: str | Path, *, split: str | None = None, language: str = "en"
) -> SampleSet:
    """Read one of Karpathy's split files; "restval" counts as training.

    Args:
        annotations: `dataset_coco.json`, `dataset_flickr30k.json` or `dataset_flickr8k.json`.
        images: the folder of pictures, or for COCO the one above `train2014` and `val2014`.
        split: "train", "val" or "test"; None for all, told apart by `Sample.split`.
        language: code of the captions' language.
    Raises:
        FileNotFoundError: the file or the folder is missing.
        FormatError: the file is not of this format; the message says which it looks like.
        ValueError: `split` does not occur, or no picture has both a file and a caption.
    """
    path = existing_file(annotations, "annotations")
    folder, skips = ImageFolder(images), SkipReport()
    keys = DistinctKeys(skips)
    document = read_json(path, "a Karpathy split")
    if recognise_document(document) != "a Karpathy split (format 'karpathy')":
        found = recognise_document(document)
        raise FormatError(
            f"{path}: expected a Karpathy split ('images' with 'sentences')"
            + (f"; it looks like {found}" if found else "")
        )
    splits = {str(image.get("split")) for image in document["images"] if isinstance(image, dict)}
    splits = {"train" if name == "restval" else name for name in splits}
    if split is not None and split not in splits:
        raise ValueError(f"{path}: split must be one of {sorted(splits)}, got {split!r}")

    samples = []
    for position, image in enumerate(document["images"]):
        where = f"{path}: images[{position}]"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            skips.add(BAD_ROW, f"{where} needs 'filename'")
            continue
        own_split = "train" if image.get("split") == "restval" else str(image.get("split"))
        if split is not None and own_split != split:
            continue
        name = image["filename"]
        nested = [f"{image['filepath']}/{name}"] if image.get("filepath") else []
        found_path = folder.find_or_skip(skips, where, *nested, name)
        if found_path is None:
            continue
        sentences = image.get("sentences")
        entries = sentences if isinstance(sentences, list) else []
        raw = [entry.get("raw") if isinstance(entry, dict) else entry for entry in entries]
        texts = clean_captions(raw, skips, where)
        if not texts:
            skips.add(NO_CAPTION, f"{where}: {name}")
            continue
        identifiers = {field: image[field] for field in ("imgid", "cocoid", "sentids") if field in image}
        samples.append(
            Sample(
                key=keys(name),
                image=found_path,
                captions=texts,
                languages=[language] * len(texts),
                split=own_split,
                metadata=identifiers,
            )
        )
    skips.raise_if_empty(len(samples), path)
    return SampleSet(samples, name=path.stem, skips=skips)
