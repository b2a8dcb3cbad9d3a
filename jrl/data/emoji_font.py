"""Pictures of emoji drawn by Pillow from an installed colour-emoji font, with a cache on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

FONT_FILE = "NotoColorEmoji.ttf"
FONT_PACKAGE = "fonts-noto-color-emoji"
_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/Library/Fonts",
)
_STRIKE = 109  # the one size at which the CBDT bitmaps of this font exist
_THUMBNAIL = 16
# A noncharacter, and the flag of region ZZ ("unknown"): what a font draws for them is a placeholder.
_NEVER_ASSIGNED = ("\U0010ffff", "\U0001f1ff\U0001f1ff")
_CACHE_FORMAT = 2


@dataclass(frozen=True)
class EmojiPictures:
    """Pictures of a list of emoji, row by row.

    Attributes:
        sequences: the emoji drawn, length N.
        pixels: [N, size, size, 3] uint8, on white; may be mapped from a file.
        digests: SHA-256 of the picture at the font's own size, length N; equal digests are equal pictures.
        thumbnails: [N, 16, 16, 3] uint8, independent of ``size``.
        skipped: emoji that are not in ``sequences``, each with the reason.
    """

    sequences: tuple[str, ...]
    pixels: np.ndarray
    digests: tuple[str, ...]
    thumbnails: np.ndarray
    skipped: dict[str, str]


def find_emoji_font(path: str | os.PathLike[str] | None = None) -> Path:
    """Path of the colour-emoji font.

    Args:
        path: a font file, or a folder to search; by default fontconfig and the usual folders are searched.

    Returns:
        The path of the font file.

    Raises:
        FileNotFoundError: no such font; the message names the Debian package that installs it.
    """
    if path is not None:
        given = Path(path).expanduser()
        if given.is_file():
            return given
        found = sorted(given.rglob(FONT_FILE)) if given.is_dir() else []
        if found:
            return found[0]
        raise FileNotFoundError(f"font: expected a font file or a folder holding {FONT_FILE}, got {given}")
    listed = _fontconfig_path()
    if listed is not None:
        return listed
    for folder in _FOLDERS:
        for candidate in sorted(Path(folder).expanduser().rglob(FONT_FILE)):
            return candidate
    raise FileNotFoundError(
        f"no colour-emoji font found: {FONT_FILE} is neither known to fontconfig nor under "
        f"{', '.join(_FOLDERS)}; install the Debian package {FONT_PACKAGE} "
        f"(apt-get install {FONT_PACKAGE}) or pass font="
    )


def _fontconfig_path() -> Path | None:
    command = shutil.which("fc-list")
    if command is None:
        return None
    listing = subprocess.run([command, "--format=%{file}\n"], capture_output=True, text=True, check=False)
    for line in sorted(listing.stdout.splitlines()):
        if line.endswith("/" + FONT_FILE) and Path(line).is_file():
            return Path(line)
    return None


def can_shape() -> bool:
    """Whether Pillow can shape sequences (libraqm), as flags, skin tones and joined emoji need."""
    return bool(features.check("raqm"))


class EmojiPainter:
    """Draws emoji from one font file; refuses those that the font does not draw as one picture.

    Args:
        font: path of the font file.
        shaping: use libraqm; by default wherever Pillow has it.

    Raises:
        ValueError: the file is no font with colour bitmaps of 109 pixels, or shaping is asked for but
            missing.
    """

    def __init__(self, font: Path, shaping: bool | None = None) -> None:
        self.shaping = can_shape() if shaping is None else shaping
        if self.shaping and not can_shape():
            raise ValueError("shaping: expected Pillow with libraqm, got a Pillow without it")
        layout = ImageFont.Layout.RAQM if self.shaping else ImageFont.Layout.BASIC
        try:
            self._font = ImageFont.truetype(str(font), _STRIKE, layout_engine=layout)
        except OSError as error:
            raise ValueError(
                f"font: expected a font with {_STRIKE}-pixel colour bitmaps such as {FONT_FILE}, "
                f"got {font} ({error})"
            ) from error
        self._width = self._font.getlength("\U0001f600")
        placeholders = [self._paint(sequence) for sequence in _NEVER_ASSIGNED]
        self._placeholders = {picture.tobytes() for picture in placeholders if picture is not None}
        face = self._paint("\U0001f600")
        if face is None or face.convert("HSV").getchannel("S").getextrema()[1] == 0:
            raise ValueError(f"font: expected a colour-emoji font, got {font}, which draws no coloured emoji")

    def paint(self, sequence: str) -> Image.Image | str:
        """The picture as RGBA at the font's own size, or the reason why there is none."""
        text = sequence if self.shaping else sequence.replace("\ufe0f", "")
        if self._font.getlength(text) > 1.5 * self._width:
            if not self.shaping and len(text) > 1:
                return "needs text shaping, which this Pillow lacks (libraqm)"
            return "the font draws it as several pictures"
        picture = self._paint(text)
        if picture is None or picture.tobytes() in self._placeholders:
            return "the font has no picture of it"
        return picture

    def _paint(self, text: str) -> Image.Image | None:
        box = self._font.getbbox(text)
        left, top, right, bottom = round(box[0]), round(box[1]), round(box[2]), round(box[3])
        side = max(right - left, bottom - top)
        if min(right - left, bottom - top) < 1:
            return None
        picture = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        origin = ((side - (right - left)) // 2 - left, (side - (bottom - top)) // 2 - top)
        ImageDraw.Draw(picture).text(origin, text, font=self._font, embedded_color=True)
        return picture if picture.getchannel("A").getbbox() else None


def draw_emoji(
    sequences: Sequence[str],
    *,
    font: Path,
    size: int = 64,
    cache: str | os.PathLike[str] | None = None,
) -> EmojiPictures:
    """Draw every emoji that the font holds as one picture, on white.

    Args:
        sequences: emoji, each one or several code points.
        font: path of the font file.
        size: side of the square pictures in pixels.
        cache: folder for the drawn pictures; a later call with the same font, size and emoji maps them from
            there. Without it they are kept in memory.

    Returns:
        The pictures, in the order of ``sequences``.

    Raises:
        ValueError: ``size`` below 8 or above 512, or a file that is no colour-emoji font.
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size: expected an int, got {type(size).__name__}")
    if not 8 <= size <= 512:
        raise ValueError(f"size: expected 8 to 512 pixels, got {size}")
    if cache is None:
        return _draw(sequences, font, size)
    shaping = can_shape()
    digest = hashlib.sha256(font.read_bytes())
    digest.update(f"{_CACHE_FORMAT} {size} {shaping} ".encode() + "\n".join(sequences).encode())
    folder = Path(cache).expanduser() / f"emoji-{size}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        try:
            return _load(folder, size)
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(
                f"{folder}: unreadable emoji cache ({error}); drawing the pictures again", stacklevel=2
            )
            shutil.rmtree(folder)
    _save(folder, _draw(sequences, font, size))
    return _load(folder, size)


def _draw(sequences: Sequence[str], font: Path, size: int) -> EmojiPictures:
    painter = EmojiPainter(font)
    kept, pixels, thumbnails, digests = [], [], [], []
    skipped: dict[str, str] = {}
    for sequence in sequences:
        picture = painter.paint(sequence)
        if isinstance(picture, str):
            skipped[sequence] = picture
            continue
        kept.append(sequence)
        digests.append(hashlib.sha256(picture.tobytes()).hexdigest())
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        opaque = Image.alpha_composite(white, picture).convert("RGB")
        pixels.append(np.asarray(opaque.resize((size, size), Image.Resampling.LANCZOS)))
        thumbnails.append(np.asarray(opaque.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)))
    return EmojiPictures(
        tuple(kept),
        np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8),
        tuple(digests),
        np.stack(thumbnails) if thumbnails else np.zeros((0, _THUMBNAIL, _THUMBNAIL, 3), np.uint8),
        skipped,
    )


def _save(folder: Path, pictures: EmojiPictures) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        np.save(aside / "pixels.npy", pictures.pixels)
        np.savez(
            aside / "index.npz",
            sequences=np.array(pictures.sequences, dtype=np.str_),
            digests=np.array(pictures.digests, dtype=np.str_),
            thumbnails=pictures.thumbnails,
            skipped=np.array(list(pictures.skipped.items()), dtype=np.str_).reshape(-1, 2),
        )
        # Another process may have finished first: its folder holds the same bytes.
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _load(folder: Path, size: int) -> EmojiPictures:
    pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
    with np.load(folder / "index.npz", allow_pickle=False) as index:
        sequences = tuple(str(s) for s in index["sequences"])
        digests = tuple(str(s) for s in index["digests"])
        thumbnails = index["thumbnails"]
        skipped = {str(sequence): str(reason) for sequence, reason in index["skipped"]}
    if pixels.shape != (len(sequences), size, size, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"pixels.npy: expected {len(sequences)} pictures of {size}x{size}, got {pixels.shape}"
        )
    return EmojiPictures(sequences, pixels, digests, thumbnails, skipped)
