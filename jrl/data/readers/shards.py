"""Tar shards as img2dataset and WebDataset write them, indexed once and then read at random."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import PIL.Image

from jrl.data.images import ImageError, open_bytes
from jrl.data.readers.common import (
    BAD_ROW,
    IMAGE_MISSING,
    NO_CAPTION,
    NOT_UTF8,
    DistinctKeys,
    FormatError,
    existing_file,
    recognise,
)
from jrl.data.sample import Sample, SampleSet, SkipReport

MEMBER_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TRUNCATED = "truncated tar"
REPEATED_MEMBER = "repeated member ignored"
NO_END_MARK = "tar without an end mark"

# Whole files are read into memory at once; no caption or record comes near this.
_LARGEST_TEXT = 1 << 24
_BLOCK = 512


class UnsafeTarError(ValueError):
    """A tar member that points outside its folder, or is no plain file."""


def check_member(tar: str | Path, member: tarfile.TarInfo) -> None:
    """Refuse a member with an absolute name, "..", or of a kind other than file and folder.

    Raises:
        UnsafeTarError: naming the tar and the member.
    """
    name = PurePosixPath(member.name.replace("\\", "/"))
    if name.is_absolute() or re.match(r"[A-Za-z]:", member.name):
        problem = "has an absolute name"
    elif ".." in name.parts:
        problem = "points outside the archive"
    elif member.issym() or member.islnk():
        problem = f"is a link to {member.linkname!r}"
    elif not (member.isreg() or member.isdir()):
        problem = "is a device or another special file"
    else:
        return
    raise UnsafeTarError(f"{tar}: member {member.name!r} {problem}; refused")


def split_member_name(name: str) -> tuple[str, str]:
    """Split at the first dot of the last part: "a/b.seg.png" into ("a/b", "seg.png")."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the tar files that are meant by a path, a pattern, a folder, or a list of them.

    Args:
        shards: a file; a folder, for all its `*.tar` in sorted order; or a pattern such as
            `train-{00000..00012}.tar` or `{train,val}.tar`.
    Raises:
        FileNotFoundError: a file is missing; the message counts and names them.
        ValueError: a folder without a tar, an impossible range, or an empty list.
    """
    items = [shards] if isinstance(shards, (str, Path)) else list(shards)
    if not items:
        raise ValueError("shards must name at least one tar, got none")
    paths: list[Path] = []
    for item in items:
        path = Path(item)
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
            if not found:
                raise ValueError(f"shards: folder {path} holds no *.tar")
            paths.extend(found)
        elif path.exists():
            paths.append(path)
        else:
            paths.extend(Path(name) for name in expand_braces(str(item)))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(f"shards: {len(missing)} of {len(paths)} do not exist: {shown}")
    return paths


def expand_braces(pattern: str) -> list[str]:
    """Expand every `{a..b}` (numbers, zero-padded as written) and `{x,y}` of a pattern, the last fastest."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for position, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if position % 2 == 0:
            choices.append([piece])
        elif span:
            first, last = span.groups()
            if int(first) > int(last):
                raise ValueError(f"shards: the range {{{piece}}} runs backwards")
            padded = first.startswith("0") or last.startswith("0")
            width = max(len(first), len(last)) if padded else 0
            choices.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
        elif "," in piece:
            choices.append(piece.split(","))
        else:
            choices.append([f"{{{piece}}}"])
    return ["".join(parts) for parts in itertools.product(*choices)]


@dataclass(frozen=True)
class TarMember:
    """A file inside an uncompressed tar: calling it opens the picture."""

    tar: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the bytes; raise ImageError when the tar is gone or has become shorter."""
        try:
            with open(self.tar, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(f"{self.tar}: {self.name}: {error}") from error
        if len(data) != self.size:
            raise ImageError(f"{self.tar}: {self.name}: only {len(data)} of {self.size} bytes are there")
        return data

    def __call__(self) -> PIL.Image.Image:
        """Open the picture, not yet decoded."""
        return open_bytes(self.read(), f"{self.tar}: {self.name}")


@dataclass
class _Record:
    image: TarMember | None = None
    suffixes: set[str] = field(default_factory=set)
    text: str | None = None
    document: dict[str, Any] = field(default_factory=dict)


def read_webdataset(
    shards: str | Path | Sequence[str | Path],
    *,
    caption_field: str = "caption",
    require_captions: bool = True,
    metadata: bool = True,
    split: str = "",
    language: str = "und",
) -> SampleSet:
    """Index tar shards of `key.jpg|jpeg|png|webp`, `key.txt` and `key.json`; pictures stay in their tar.

    The headers are read once; then any sample is one seek away, so shuffling and resuming are exact. The
    caption is `key.txt`, or else a field of `key.json`. A key of an earlier shard becomes "shard/key".

    Args:
        shards: as for `expand_shards`; uncompressed.
        caption_field: the field of `key.json` that holds the caption when there is no `key.txt`.
        require_captions: skip pictures without a caption; False keeps them, with `captions` empty.
        metadata: keep what `key.json` holds; False saves memory.
        split: what to call the split.
        language: code of the captions' language.
    Raises:
        FileNotFoundError: a shard is missing.
        FormatError: a shard is compressed or no tar; the message says what it looks like.
        UnsafeTarError: a member points outside its folder or is no plain file.
        ValueError: no usable sample.
    """
    paths, skips = expand_shards(shards), SkipReport()
    keys = DistinctKeys(skips)
    samples = []
    for path in paths:
        for key, record in _read_shard(path, skips).items():
            where = f"{path}: {key}"
            if record.image is None:
                skips.add(IMAGE_MISSING, f"{where} has only {', '.join(sorted(record.suffixes))}")
                continue
            captions = captions_of(record.text, record.document, caption_field)
            if require_captions and not captions:
                skips.add(NO_CAPTION, where)
                continue
            samples.append(
                Sample(
                    key=keys(key, alternative=f"{path.stem}/{key}"),
                    image=record.image,
                    captions=captions,
                    languages=[language] * len(captions),
                    split=split,
                    metadata={"shard": path.name, **(record.document if metadata else {})},
                )
            )
    skips.raise_if_empty(len(samples), paths[0] if len(paths) == 1 else f"{len(paths)} shards")
    return SampleSet(samples, name=paths[0].stem if len(paths) == 1 else paths[0].parent.name, skips=skips)


def captions_of(text: str | None, document: dict[str, Any], caption_field: str) -> list[str]:
    """Return the caption of `key.txt`, or of `key.json` when there is none: zero or one string."""
    for caption in (text, document.get(caption_field)):
        if isinstance(caption, str) and caption.strip():
            return [caption.strip()]
    return []


def parse_text(raw: bytes, where: str, skips: SkipReport) -> str | None:
    """Decode UTF-8, BOM allowed; None, noted in `skips`, when it is not."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        skips.note(NOT_UTF8, f"{where}: {error.reason} at byte {error.start}")
        return None


def parse_record(raw: bytes, where: str, skips: SkipReport) -> dict[str, Any]:
    """Parse a JSON object; empty, noted in `skips`, when it is none."""
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        skips.note(BAD_ROW, f"{where}: {error}")
        return {}
    if not isinstance(document, dict):
        skips.note(BAD_ROW, f"{where}: expected a JSON object, got {type(document).__name__}")
        return {}
    return document


def _read_shard(path: Path, skips: SkipReport) -> dict[str, _Record]:
    size = existing_file(path, "shards").stat().st_size
    records: dict[str, _Record] = {}
    with open(path, "rb") as file:
        for member in shard_members(path, file, size, skips):
            key, suffix = split_member_name(member.name)
            where = f"{path}: {member.name}"
            record = records.setdefault(key, _Record())
            is_image = suffix in MEMBER_SUFFIXES
            if suffix in record.suffixes or (is_image and record.image is not None):
                skips.note(REPEATED_MEMBER, where)
                continue
            record.suffixes.add(suffix)
            if is_image:
                record.image = TarMember(path, member.name, member.offset_data, member.size)
            elif suffix in ("txt", "json"):
                if member.size > _LARGEST_TEXT:
                    raise FormatError(
                        f"{where}: {member.size} bytes of text, at most {_LARGEST_TEXT} expected"
                    )
                position = file.tell()
                file.seek(member.offset_data)
                raw = file.read(member.size)
                file.seek(position)
                if suffix == "txt":
                    record.text = parse_text(raw, where, skips)
                else:
                    record.document = parse_record(raw, where, skips)
    return records


def shard_members(
    path: Path, file: io.BufferedReader, size: int, skips: SkipReport
) -> Iterator[tarfile.TarInfo]:
    """Yield the plain files whose bytes are all there; a damaged end is counted in `skips`.

    Args:
        path: the tar, for messages.
        file: the tar, open; the caller may read from it between two members if it seeks back.
        size: of the tar in bytes.
        skips: where to count.
    Raises:
        FormatError, UnsafeTarError: as for `read_webdataset`.
    """
    end = 0
    try:
        archive = tarfile.TarFile(fileobj=file)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _not_a_tar(path, error) from error
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, ValueError, OverflowError) as error:
            skips.add(TRUNCATED, f"{path}: after byte {end}: {error}")
            return
        if member is None:
            break
        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        check_member(path, member)
        if member.issparse() or member.size < 0:
            raise FormatError(f"{path}: member {member.name!r} is sparse or damaged; pack it as a plain file")
        end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
        if member.isdir() or _is_meta(member.name):
            continue
        if member.offset_data + member.size > size:
            last = member.offset_data + member.size
            skips.add(TRUNCATED, f"{path}: {member.name} reaches to byte {last} of {size}")
            return
        yield member
    file.seek(end)
    mark = file.read(_BLOCK)
    if mark.strip(b"\0"):
        skips.add(TRUNCATED, f"{path}: damaged header at byte {end}")
    elif len(mark) < _BLOCK:
        skips.note(NO_END_MARK, f"{path} may have been cut off at byte {size}")


def _not_a_tar(path: Path, error: Exception) -> FormatError:
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:2] == b"\x1f\x8b" or magic[:3] == b"BZh" or magic == b"\xfd7zXZ\0":
        return FormatError(f"{path}: the tar is compressed, so it cannot be read at random; decompress it")
    found = recognise(path)
    return FormatError(f"{path}: expected a tar: {error}" + (f"; it looks like {found}" if found else ""))


def _is_meta(name: str) -> bool:
    base = PurePosixPath(name).name
    return base.startswith(".") or (base.startswith("__") and base.endswith("__"))
