"""Captions in lines of text: Flickr30k tokens, Conceptual Captions TSV, open_clip CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from jrl.data.readers.common import (
    BAD_ROW,
    EMPTY_CAPTION,
    IMAGE_MISSING,
    NO_CAPTION,
    NOT_UTF8,
    OUTSIDE,
    DistinctKeys,
    FormatError,
    ImageFolder,
    clean_captions,
    existing_file,
    recognise,
    text_lines,
    wrong_format,
)
from jrl.data.sample import Sample, SampleSet, SkipReport

_TOKEN = re.compile(r"(?P<name>[^\t]+)#(?P<number>\d+)\t(?P<caption>.*)", re.DOTALL)
_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp")

FileRule = Literal["basename", "index"] | Callable[[int, str], str]


def read_flickr30k(
    tokens: str | Path, images: str | Path, *, split: str = "", language: str = "en"
) -> SampleSet:
    """Read a Flickr token file: lines of `name.jpg#k<TAB>caption`, gathered by picture in the order of k.

    Args:
        tokens: `results_20130124.token`, `Flickr8k.token.txt` or one like them.
        images: the folder of pictures.
        split: what to call the split.
        language: code of the captions' language.
    Raises:
        FileNotFoundError: the file or the folder is missing.
        FormatError: the file is not of this format; the message says which it looks like.
        ValueError: no picture has both a file and a caption.
    """
    path = existing_file(tokens, "tokens")
    folder, skips = ImageFolder(images), SkipReport()
    captions: dict[str, list[tuple[int, int, str]]] = {}
    for line_number, line in text_lines(path, skips):
        match = _TOKEN.fullmatch(line)
        if match is None:
            skips.add(BAD_ROW, f"{path}:{line_number}: {line[:60]!r}")
            continue
        captions.setdefault(match["name"], []).append((int(match["number"]), line_number, match["caption"]))
    if not captions:
        _refuse_other(path, "Flickr30k tokens", "no line is name.jpg#k<TAB>caption")
    samples = []
    for name, entries in captions.items():
        where = f"{path}:{entries[0][1]}"
        found = folder.find_or_skip(skips, where, name)
        if found is None:
            continue
        texts = clean_captions([caption for _, _, caption in sorted(entries)], skips, where)
        if not texts:
            skips.add(NO_CAPTION, f"{where}: {name}")
            continue
        languages = [language] * len(texts)
        samples.append(Sample(key=name, image=found, captions=texts, languages=languages, split=split))
    skips.raise_if_empty(len(samples), path)
    return SampleSet(samples, name=path.stem, skips=skips)


def _refuse_other(path: Path, expected: str, why: str) -> None:
    """Raise when a file of which no row was understood is of another known format."""
    found = recognise(path)
    if found is not None and not found.startswith(expected):
        raise wrong_format(path, expected, why)


def read_cc3m(
    table: str | Path,
    images: str | Path,
    *,
    files: FileRule = "basename",
    split: str = "",
    language: str = "en",
) -> SampleSet:
    """Read a Conceptual Captions 3M TSV (caption, url; no header) over pictures that lie in a folder.

    Args:
        table: the TSV.
        images: the folder of pictures, downloaded beforehand.
        files: from a row to its picture: "basename", the last part of the url's path; "index", the row from 0
            in nine digits, as img2dataset names the files when it numbers them by row; or a function of
            (row from 0, url). A name without its suffix is tried with .jpg, .jpeg, .png and .webp.
        split: what to call the split.
        language: code of the captions' language.
    Raises:
        FileNotFoundError: the file or the folder is missing.
        FormatError: the file is not of this format (CC12M has the columns the other way round).
        ValueError: `files` is not a rule, or no row has both a picture and a caption.
    """
    return _read_conceptual(table, images, files, split, language, url_column=1, expected="a CC3M TSV")


def read_cc12m(
    table: str | Path,
    images: str | Path,
    *,
    files: FileRule = "basename",
    split: str = "",
    language: str = "en",
) -> SampleSet:
    """Read a Conceptual 12M TSV (url, caption; no header); arguments and errors as for `read_cc3m`."""
    return _read_conceptual(table, images, files, split, language, url_column=0, expected="a CC12M TSV")


def _read_conceptual(
    table: str | Path,
    images: str | Path,
    files: FileRule,
    split: str,
    language: str,
    url_column: int,
    expected: str,
) -> SampleSet:
    if not callable(files) and files not in ("basename", "index"):
        raise ValueError(f"files must be 'basename', 'index' or a function, got {files!r}")
    path = existing_file(table, "table")
    folder, skips = ImageFolder(images), SkipReport()
    keys = DistinctKeys(skips)
    samples: list[Sample] = []
    understood = False
    for line_number, line in text_lines(path, skips):
        cells = line.split("\t")
        where = f"{path}:{line_number}"
        if len(cells) != 2 or not re.match(r"https?://", cells[url_column], re.IGNORECASE):
            skips.add(BAD_ROW, f"{where}: {line[:60]!r}")
            continue
        understood = True
        url, row = cells[url_column].strip(), line_number - 1
        name = _file_of(files, row, url)
        texts = clean_captions([cells[1 - url_column]], skips, where)
        if not texts:
            skips.add(NO_CAPTION, where)
            continue
        if not name:
            skips.add(IMAGE_MISSING, f"{where}: the url names no file: {url}")
            continue
        found = folder.find_or_skip(skips, where, *(name + suffix for suffix in _SUFFIXES))
        if found is None:
            continue
        key = found.relative_to(folder.root).as_posix()
        metadata = {"url": url, "row": row}
        samples.append(Sample(keys(key), found, texts, languages=[language], split=split, metadata=metadata))
    if not understood:
        _refuse_other(path, expected, f"no line has a url in column {url_column + 1} of 2")
    skips.raise_if_empty(len(samples), path)
    return SampleSet(samples, name=path.stem, skips=skips)


def _file_of(files: FileRule, row: int, url: str) -> str:
    if callable(files):
        return files(row, url)
    if files == "index":
        return f"{row:09d}"
    return PurePosixPath(unquote(urlsplit(url).path)).name


def read_csv(
    table: str | Path,
    images: str | Path | None = None,
    *,
    image_column: str = "filepath",
    caption_column: str = "title",
    delimiter: str = "\t",
    split: str = "",
    language: str = "und",
) -> SampleSet:
    """Read the table that open_clip trains on: a header, then one picture and one caption a row.

    Args:
        table: the file; quotes work as in CSV. Rows that name the same picture become one sample.
        images: what relative paths are relative to; by default the table's folder. A relative path must stay
            inside; an absolute one is taken as it is.
        image_column, caption_column: names in the header.
        delimiter: one character; open_clip's default is a tab.
        split: what to call the split.
        language: code of the captions' language.
    Raises:
        FileNotFoundError: the file or the folder is missing.
        FormatError: the header lacks a column; the message says which there are.
        ValueError: `delimiter` is not one character, or no row has both a picture and a caption.
    """
    if len(delimiter) != 1:
        raise ValueError(f"delimiter must be one character, got {delimiter!r}")
    path = existing_file(table, "table")
    folder, skips = ImageFolder(path.parent if images is None else images), SkipReport()
    captions: dict[Path, list[str]] = {}
    names: dict[Path, str] = {}
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader, [])
            for column in (image_column, caption_column):
                if column not in header:
                    raise wrong_format(
                        path, "an open_clip CSV", f"no column {column!r} in the header {header[:8]}"
                    )
            at_image, at_caption = header.index(image_column), header.index(caption_column)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    skips.add(BAD_ROW, f"{where}: {len(row)} cells under {len(header)} columns")
                    continue
                name, caption = row[at_image], row[at_caption].strip()
                if any("\udc80" <= character <= "\udcff" for character in name + caption):
                    skips.add(NOT_UTF8, where)
                    continue
                found = _absolute_or_inside(folder, skips, where, name)
                if found is None:
                    continue
                if not caption:
                    skips.note(EMPTY_CAPTION, where)
                captions.setdefault(found, []).extend([caption] if caption else [])
                names.setdefault(found, name)
        except csv.Error as error:
            raise FormatError(f"{path}:{reader.line_num}: {error} (an unbalanced quote?)") from error
    samples = []
    for found, texts in captions.items():
        if not texts:
            skips.add(NO_CAPTION, f"{path}: {names[found]}")
            continue
        languages = [language] * len(texts)
        samples.append(Sample(names[found], found, texts, languages=languages, split=split))
    skips.raise_if_empty(len(samples), path)
    return SampleSet(samples, name=path.stem, skips=skips)


def _absolute_or_inside(folder: ImageFolder, skips: SkipReport, where: str, name: str) -> Path | None:
    if not Path(name).is_absolute():
        return folder.find_or_skip(skips, where, name)
    if "\0" in name:
        skips.add(OUTSIDE, f"{where}: {name!r} holds a NUL")
        return None
    if not Path(name).is_file():
        skips.add(IMAGE_MISSING, f"{where}: {name}")
        return None
    return Path(name)
