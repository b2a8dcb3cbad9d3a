"""What the readers share: text files with their quirks, image folders, distinct keys, recognising formats."""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jrl.data.sample import SkipReport

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

NO_CAPTION = "no caption"
IMAGE_MISSING = "image file missing"
OUTSIDE = "image path outside the image folder"
BAD_ROW = "malformed row"
NOT_UTF8 = "not UTF-8"
EMPTY_CAPTION = "empty caption dropped"
REPEATED_KEY = "repeated key renamed"

_URL = re.compile(r"https?://", re.IGNORECASE)
_TOKEN_ROW = re.compile(r"[^\t]+#\d+\t")


class FormatError(ValueError):
    """A caption file that is not of the format asked for, or is damaged."""


def existing_file(path: str | Path, what: str) -> Path:
    """Return `path` if it is a file that is not empty; raise FileNotFoundError or ValueError if not."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{what}: {path} is a folder, expected a file")
    if not path.exists():
        raise FileNotFoundError(f"{what}: {path}: no such file")
    if path.stat().st_size == 0:
        raise FormatError(f"{what}: {path} is empty")
    return path


def existing_folder(path: str | Path, what: str) -> Path:
    """Return `path` if it is a folder; raise FileNotFoundError or NotADirectoryError if not."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{what}: {path}: no such folder")
    if not path.is_dir():
        raise NotADirectoryError(f"{what}: {path} is a file, expected a folder")
    return path


def text_lines(path: Path, skips: SkipReport) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of UTF-8 text, plain or gzip, without BOM, CRLF and blank lines.

    Only a newline ends a line: captions may hold other separators. Lines that are not UTF-8 are counted in
    `skips`.
    """
    opener = gzip.open if _is_gzip(path) else open
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    _refuse_utf16(path, raw)
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                try:
                    line = raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    skips.add(NOT_UTF8, f"{path}:{number}: {error.reason} at byte {error.start}")
                    continue
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(f"{path}: damaged gzip file: {error}") from error


def read_json(path: Path, expected: str) -> Any:
    """Parse a JSON file, BOM allowed; a failure names the file, the line and the format it looks like."""
    raw = path.read_bytes()
    _refuse_utf16(path, raw)
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise wrong_format(path, expected, f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise wrong_format(
            path, expected, f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise FormatError(f"{path}: JSON nested too deeply") from error


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _refuse_utf16(path: Path, raw: bytes) -> None:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise FormatError(f"{path}: text is UTF-16, expected UTF-8; save it as UTF-8")


def wrong_format(path: Path, expected: str, why: str) -> FormatError:
    """Build the error for a file of another format; it says which format the file looks like."""
    found = recognise(path)
    hint = f"; it looks like {found}" if found and not found.startswith(expected) else ""
    return FormatError(f"{path}: expected {expected}: {why}{hint}")


def recognise(path: Path) -> str | None:
    """Name the format that a file looks like, with the `read` format for it; None when it is like none."""
    if tarfile.is_tarfile(path):
        return "a tar archive (format 'webdataset')"
    with gzip.open(path, "rb") if _is_gzip(path) else open(path, "rb") as file:
        try:
            head = file.read(1 << 20)
        except (EOFError, OSError, zlib.error):
            return None
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n" or head[8:12] == b"WEBP":
        return "a picture"
    try:
        text = head.decode("utf-8-sig", errors="strict" if len(head) < 1 << 20 else "ignore")
    except UnicodeDecodeError:
        return None
    line = text.lstrip().split("\n", 1)[0].rstrip("\r")
    if line.startswith(("{", "[")):
        return _recognise_json(path, line)
    if _TOKEN_ROW.match(line):
        return "Flickr30k tokens (format 'flickr30k')"
    cells = line.split("\t")
    if len(cells) == 2 and _URL.match(cells[1]):
        return "a CC3M TSV of caption, url (format 'cc3m')"
    if len(cells) == 2 and _URL.match(cells[0]):
        return "a CC12M TSV of url, caption (format 'cc12m')"
    if {"filepath", "title"} <= {cell.strip('"') for cell in cells}:
        return "an open_clip CSV (format 'csv')"
    return None


def _recognise_json(path: Path, first_line: str) -> str | None:
    document: Any = None
    for load in (lambda: json.loads(first_line), lambda: json.loads(path.read_text("utf-8-sig"))):
        try:
            document = load()
            break
        except (ValueError, RecursionError):
            continue
    return recognise_document(document)


def recognise_document(document: Any) -> str | None:
    """Name the format of a parsed JSON document; None when it is like none."""
    if not isinstance(document, dict):
        return None
    if {"image_id", "caption"} <= document.keys() and "images" not in document:
        return "Localized Narratives JSONL (format 'localized_narratives')"
    images, annotations = document.get("images"), document.get("annotations")
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        return "a Karpathy split (format 'karpathy')"
    if isinstance(images, list) and isinstance(annotations, list):
        first = annotations[0] if annotations and isinstance(annotations[0], dict) else {}
        if "caption" in first:
            return "COCO captions (format 'coco')"
        if "bbox" in first or "segmentation" in first:
            return "COCO instances (argument 'instances' of format 'coco')"
        return "a COCO annotation file without captions"
    if isinstance(images, list):
        return "COCO image information without annotations (a test set?)"
    return None


class ImageFolder:
    """Finds pictures under a folder by relative name, listing each subfolder once; nothing outside is found.

    Names are compared exactly, then in Unicode normal form C, since some systems store names decomposed.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = existing_folder(root, "images")
        self._listings: dict[PurePosixPath, dict[str, str]] = {}

    def find(self, *names: str) -> Path | None:
        """Return the first of `names` that is a file below the folder.

        Raises:
            ValueError: a name is absolute, holds "..", a backslash, or a NUL.
        """
        for name in names:
            relative = PurePosixPath(name)
            if not name or relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
                raise ValueError(f"{name!r} is not a relative path inside {self.root}")
            found = self._listing(relative.parent).get(relative.name)
            if found is None:
                found = self._listing(relative.parent).get(unicodedata.normalize("NFC", relative.name))
            if found is not None:
                return self.root / relative.parent / found
        return None

    def find_or_skip(self, skips: SkipReport, where: str, *names: str) -> Path | None:
        """As `find`, but count a picture that is missing or outside in `skips` and return None."""
        try:
            path = self.find(*names)
        except ValueError as error:
            skips.add(OUTSIDE, f"{where}: {error}")
            return None
        if path is None:
            skips.add(IMAGE_MISSING, f"{where}: {self.root / names[0]}")
        return path

    def _listing(self, folder: PurePosixPath) -> dict[str, str]:
        if folder not in self._listings:
            names: dict[str, str] = {}
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        if entry.is_file():
                            names.setdefault(unicodedata.normalize("NFC", entry.name), entry.name)
                            names[entry.name] = entry.name
            except (FileNotFoundError, NotADirectoryError):
                pass  # the caller counts each picture of this folder as missing
            self._listings[folder] = names
        return self._listings[folder]


class DistinctKeys:
    """Hands out keys that never repeat: the second "a" becomes "a#2", which `skips` notes."""

    def __init__(self, skips: SkipReport) -> None:
        self._skips = skips
        self._seen: set[str] = set()

    def __call__(self, key: str, alternative: str | None = None) -> str:
        chosen, count = key, 1
        if chosen in self._seen and alternative is not None:
            chosen = alternative
        base = chosen
        while chosen in self._seen:
            count += 1
            chosen = f"{base}#{count}"
        if chosen != key:
            self._skips.note(REPEATED_KEY, f"{key} became {chosen}")
        self._seen.add(chosen)
        return chosen


def clean_captions(captions: list[Any], skips: SkipReport, where: str) -> list[str]:
    """Strip the captions and drop those that are empty or no text, which `skips` notes."""
    kept = []
    for caption in captions:
        if isinstance(caption, str) and caption.strip():
            kept.append(caption.strip())
        else:
            skips.note(EMPTY_CAPTION, f"{where}: {caption!r}")
    return kept
