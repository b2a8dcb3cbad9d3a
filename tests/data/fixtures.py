"""Small datasets in the true formats, written byte by byte into a folder that a test owns."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

Members = list[tuple[str, bytes]]


def picture(colour: tuple[int, int, int] = (200, 30, 60), size: tuple[int, int] = (12, 8)) -> PIL.Image.Image:
    """Return a picture of one colour."""
    return PIL.Image.new("RGB", size, colour)


def encoded(image: PIL.Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    """Return the picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def jpeg(number: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    """Return a JPEG whose colour depends on `number`."""
    return encoded(picture(((number * 40) % 256, 80, 120), size), quality=95)


def truncated_jpeg() -> bytes:
    """Return a JPEG cut off in the middle of its scan."""
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = encoded(PIL.Image.fromarray(noise.numpy()), quality=95)
    return whole[: len(whole) // 2]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one PNG chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb_png(width: int = 50_000, height: int = 50_000) -> bytes:
    """Return a small PNG whose header claims width x height grey pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        + png_chunk(b"IEND", b"")
    )


def write_pictures(folder: Path, *names: str, size: tuple[int, int] = (12, 8)) -> Path:
    """Write one JPEG or PNG a name, in subfolders as named, and return the folder."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.suffix == ".png" else "JPEG"
        path.write_bytes(encoded(picture(((number * 40) % 256, 80, 120), size), kind))
    return folder


def coco_image(image_id: int, name: str, width: int = 12, height: int = 8) -> dict[str, Any]:
    """Return an entry of `images` with the fields that COCO gives it."""
    return {
        "license": 3,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/val2017/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
        "id": image_id,
    }


def coco_document(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a COCO annotation document."""
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017, "version": "1.0"},
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 3, "name": "Attribution"}],
        "images": images,
        "annotations": annotations,
    }


def coco_captions() -> dict[str, Any]:
    """Return captions of four pictures; the second has one caption, the fourth none."""
    images = [coco_image(number, f"{number:012d}.jpg") for number in (139, 285, 632, 724)]
    annotations = [
        {"image_id": 285, "id": 771, "caption": "A big burly grizzly bear is shown with grass."},
        {"image_id": 139, "id": 182, "caption": "A woman stands in the dining area at the table.\n"},
        {"image_id": 139, "id": 185, "caption": "A room with chairs, a table, and a café sign."},
        {"image_id": 632, "id": 902, "caption": "Bedroom scene with a bookcase, blue comforter."},
    ]
    return coco_document(images, annotations)


def coco_instances() -> dict[str, Any]:
    """Return polygons, uncompressed run lengths of a crowd, and a broken box, over 12 x 8 pictures."""
    annotations = [
        {
            "segmentation": [[1, 1, 6, 1, 6, 6, 1, 6]],
            "area": 25.0,
            "iscrowd": 0,
            "image_id": 139,
            "bbox": [1.0, 1.0, 5.0, 5.0],
            "category_id": 62,
            "id": 100,
        },
        {
            "segmentation": {"counts": [64, 32], "size": [8, 12]},
            "area": 32,
            "iscrowd": 1,
            "image_id": 139,
            "bbox": [8, 0, 4, 8],
            "category_id": 1,
            "id": 101,
        },
        {"segmentation": [], "image_id": 139, "bbox": [3, 3, 0, 2], "category_id": 1, "id": 102},
    ]
    document = coco_document([coco_image(139, "000000000139.jpg")], annotations)
    document["categories"] = [
        {"supercategory": "person", "id": 1, "name": "person"},
        {"supercategory": "furniture", "id": 62, "name": "chair"},
    ]
    return document


def karpathy_document() -> dict[str, Any]:
    """Return Karpathy's split of COCO, with a picture of each split and one of "restval"."""

    def image(imgid: int, folder: str, name: str, split: str, *sentences: str) -> dict[str, Any]:
        return {
            "filepath": folder,
            "sentids": [imgid * 5 + position for position in range(len(sentences))],
            "filename": name,
            "imgid": imgid,
            "split": split,
            "sentences": [
                {
                    "tokens": text.lower().rstrip(".").split(),
                    "raw": text,
                    "imgid": imgid,
                    "sentid": imgid * 5 + position,
                }
                for position, text in enumerate(sentences)
            ],
            "cocoid": 391_000 + imgid,
        }

    return {
        "images": [
            image(
                0, "val2014", "COCO_val2014_000000391895.jpg", "test", "A man with a red helmet.", "A man."
            ),
            image(1, "val2014", "COCO_val2014_000000060623.jpg", "restval", "A young girl inhales."),
            image(2, "train2014", "COCO_train2014_000000318556.jpg", "train", "A clean bathroom."),
            image(3, "val2014", "COCO_val2014_000000222016.jpg", "val", "Two women by a fountain."),
        ],
        "dataset": "coco",
    }


def narrative(image_id: str, caption: str, annotator: int = 0) -> dict[str, Any]:
    """Return one Localized Narrative with a stroke and a timed word for each word of the caption."""
    words = caption.split()
    return {
        "dataset_id": "mscoco_val2017",
        "image_id": image_id,
        "annotator_id": annotator,
        "caption": caption,
        "timed_caption": [
            {"start_time": float(position), "end_time": position + 0.5, "utterance": word}
            for position, word in enumerate(words)
        ],
        "traces": [
            [{"x": 0.1 * step, "y": -0.02, "t": position + 0.1 * step} for step in range(3)]
            for position, _ in enumerate(words)
        ],
        "voice_recording": f"coco_val/coco_val_{int(image_id):012d}_{annotator}.ogg",
    }


def write_json(path: Path, document: Any, *, bom: bool = False) -> Path:
    """Write a JSON file, if asked with a byte order mark."""
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + json.dumps(document).encode())
    return path


def write_tar(path: Path, members: Members, *, mode: str = "w") -> Path:
    """Write a tar of plain files in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def img2dataset_members(first: int, count: int, *, without_caption: tuple[int, ...] = ()) -> Members:
    """Return the files of one img2dataset shard; keys are nine digits, the record holds the caption too."""
    members: Members = []
    for number in range(first, first + count):
        key, caption = f"{number:09d}", None if number in without_caption else f"a picture of thing {number}"
        record = {
            "url": f"https://example.org/{number}.jpg",
            "caption": caption,
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 12,
            "height": 8,
        }
        members.append((f"{key}.jpg", jpeg(number)))
        members.append((f"{key}.json", json.dumps(record).encode()))
        if caption is not None:
            members.append((f"{key}.txt", caption.encode()))
    return members


class WordTokenizer:
    """The calling convention of a transformers tokenizer: a word is its length; 1 begins and 2 ends a caption."""

    pad_token_id = 99

    def __call__(
        self,
        texts: list[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str = "pt",
    ) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` of one text."""
        if len(texts) != 1 or padding or return_tensors != "pt":
            raise ValueError("this tokenizer takes one text and does not pad")
        ids = [1, *(len(word) for word in texts[0].split()), 2]
        if truncation and max_length is not None:
            ids = ids[:max_length]
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def write_pascal(root: Path, name: str) -> dict[str, np.ndarray]:
    """Two pictures below VOCdevkit in the layout of "voc" or "context"; returns their masks, with ignored borders, by name.

    The first class is red, the second green, the last blue.
    """
    year, lists, folder, classes = {
        "voc": ("VOC2012", "Segmentation", "SegmentationClass", 21),
        "context": ("VOC2010", "SegmentationContext", "SegmentationClassContext", 60),
    }[name]
    home = root / "VOCdevkit" / year
    for place in ("JPEGImages", folder, f"ImageSets/{lists}"):
        (home / place).mkdir(parents=True)
    masks = {}
    for number, (key, (height, width)) in enumerate({"a": (20, 30), "b": (36, 18)}.items()):
        mask = np.zeros((height, width), np.uint8)
        mask[2:12, 3:13] = 1 + number
        mask[13:18, 4:16] = classes - 1
        mask[12, 3:13] = 255
        masks[key] = mask
        pixels = np.full((height, width, 3), 230, np.uint8)
        pixels[mask == 1 + number] = ((200, 30, 30), (30, 200, 30))[number]
        pixels[mask == classes - 1] = (30, 30, 200)
        PIL.Image.fromarray(pixels).save(home / "JPEGImages" / f"{key}.jpg", quality=95)
        picture = PIL.Image.fromarray(mask, mode="P")
        picture.putpalette([value for i in range(256) for value in (i, 0, 255 - i)])
        picture.save(home / folder / f"{key}.png")
    (home / "ImageSets" / lists / "val.txt").write_text("\n".join(masks) + "\n", encoding="utf-8")
    return masks


def write_coco_object(root: Path) -> None:
    """A picture with a large dog under a toothbrush beside a crowd, and one of nothing, as COCO instances."""
    for place in ("annotations", "val2017", "images"):
        (root / place).mkdir(parents=True)
    sizes = {"one.png": (12, 10), "two.png": (8, 6)}
    for name, size in sizes.items():
        PIL.Image.new("RGB", size, "white").save(root / "val2017" / name)

    def runs(place: tuple[slice, slice]) -> dict[str, Any]:
        mask = np.zeros((10, 12), bool)
        mask[place] = True
        flat = mask.T.ravel()
        changes = np.flatnonzero(np.diff(flat)) + 1
        return {"counts": np.diff([0, *changes, flat.size]).tolist(), "size": [10, 12]}

    def thing(number: int, category: int, place: tuple[slice, slice], crowd: int = 0) -> dict[str, Any]:
        return {
            "id": number,
            "image_id": 1,
            "category_id": category,
            "bbox": [1, 1, 5, 5],
            "iscrowd": crowd,
            "segmentation": runs(place),
        }

    document = {
        "images": [
            {"id": number, "file_name": name, "width": width, "height": height}
            for number, (name, (width, height)) in enumerate(sizes.items(), start=1)
        ],
        "categories": [
            {"id": 90, "name": "toothbrush"},
            {"id": 1, "name": "person"},
            {"id": 18, "name": "dog"},
        ],
        "annotations": [
            thing(1, 90, (slice(2, 4), slice(2, 4))),
            thing(2, 18, (slice(1, 8), slice(1, 9))),
            thing(3, 1, (slice(7, 10), slice(8, 12)), crowd=1),
        ],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(document), encoding="utf-8")
