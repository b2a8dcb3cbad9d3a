"""Opening, saving and transforming pictures; every failure names the picture."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from jrl.data.crops import centre_box, random_box
from jrl.data.rand_augment import RandAugment
from jrl.data.random_erasing import erase
from jrl.data.sample import ImageSource

MAX_PIXELS = 89_478_485
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MISSING = "image file missing"
EMPTY = "image file empty"
TOO_LARGE = "image too large"
UNREADABLE = "image unreadable"

# Raster formats only: Pillow's EPS plugin, for one, hands the file to an external interpreter.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_MODES = ("RGB", "RGBA", "L")
_INTERPOLATIONS = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
}


class ImageError(ValueError):
    """A picture that cannot be used; `reason` is one of MISSING, EMPTY, TOO_LARGE, UNREADABLE."""

    def __init__(self, message: str, reason: str = UNREADABLE) -> None:
        super().__init__(message)
        self.reason = reason


@cache
def _registered_formats() -> tuple[str, ...]:
    PIL.Image.init()
    return tuple(name for name in _FORMATS if name in PIL.Image.OPEN)


def load_image(
    source: ImageSource | str,
    *,
    max_pixels: int = MAX_PIXELS,
    mode: str = "RGB",
    background: tuple[int, int, int] = (255, 255, 255),
    name: str | None = None,
) -> PIL.Image.Image:
    """Decode one picture, upright, in one colour mode.

    The size in the header is checked before a pixel is decoded. EXIF orientation is applied; 16-bit greys are
    scaled to 8 bits; transparency is composited over `background` (kept for mode "RGBA"); of an animation the
    first frame is taken.

    Args:
        source: path, encoded bytes, picture, or a function that returns a picture.
        max_pixels: largest width × height; at most `PIL.Image.MAX_IMAGE_PIXELS`.
        mode: "RGB", "RGBA" or "L".
        background: colour under transparent pixels, 0 to 255.
        name: what to call the picture in messages; by default its path.
    Returns:
        A decoded picture that shares nothing with `source`.
    Raises:
        ImageError: missing, empty, too large, or not decodable; the message names the picture.
        TypeError: `source` is of another type.
        ValueError: `mode` or `max_pixels` is out of range.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    ceiling = PIL.Image.MAX_IMAGE_PIXELS
    if max_pixels < 1 or (ceiling is not None and max_pixels > ceiling):
        raise ValueError(
            f"max_pixels must be in [1, PIL.Image.MAX_IMAGE_PIXELS = {ceiling}], got {max_pixels}"
        )
    title = _title(source, name)
    picture = _open(source, title)
    try:
        width, height = picture.size
        if width * height > max_pixels:
            raise ImageError(
                f"{title}: {width}x{height} is {width * height} pixels, more than max_pixels={max_pixels}",
                TOO_LARGE,
            )
        try:
            picture.load()
            upright = PIL.ImageOps.exif_transpose(picture)
            return _convert(upright, mode, background, title)
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly any type on broken data
            raise ImageError(f"{title}: cannot decode: {type(error).__name__}: {error}") from error
    finally:
        if picture is not source:
            picture.close()


def _title(source: object, name: str | None) -> str:
    if isinstance(source, (str, os.PathLike)):
        return f"{name} ({source})" if name and name != str(source) else str(source)
    return name or type(source).__name__


def _open(source: ImageSource | str, title: str) -> PIL.Image.Image:
    if isinstance(source, PIL.Image.Image):
        return source
    if isinstance(source, (str, Path)):
        try:
            if os.stat(source).st_size == 0:
                raise ImageError(f"{title}: file is empty", EMPTY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ImageError(f"{title}: no such file", MISSING) from error
        except OSError as error:
            raise ImageError(f"{title}: cannot open: {error}") from error
    elif isinstance(source, bytes):
        if not source:
            raise ImageError(f"{title}: no bytes", EMPTY)
    elif not callable(source):
        raise TypeError(
            "source must be a path, bytes, a PIL image or a function that returns one, "
            f"got {type(source).__name__}"
        )
    if isinstance(source, (str, Path)):
        return _identify(source, title)
    if isinstance(source, bytes):
        return _identify(io.BytesIO(source), title)
    try:
        picture = source()
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ImageError(f"{title}: cannot open: {type(error).__name__}: {error}") from error
    if not isinstance(picture, PIL.Image.Image):
        raise TypeError(f"{title}: the image function must return a PIL image, got {type(picture).__name__}")
    return picture


def open_bytes(data: bytes, name: str) -> PIL.Image.Image:
    """Return the picture that encoded bytes hold, not yet decoded; raise ImageError, with `name`, if none."""
    return _open(data, name)


def _identify(file: str | Path | io.BytesIO, title: str) -> PIL.Image.Image:
    try:
        return PIL.Image.open(file, formats=_registered_formats())
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ImageError(f"{title}: {error}", TOO_LARGE) from error
    except PIL.UnidentifiedImageError as error:
        known = ", ".join(_registered_formats())
        raise ImageError(f"{title}: not a picture of a known format ({known})") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{title}: cannot open: {type(error).__name__}: {error}") from error


def _convert(
    picture: PIL.Image.Image, mode: str, background: tuple[int, int, int], title: str
) -> PIL.Image.Image:
    if picture.mode == "F":
        raise ImageError(f"{title}: floating-point pixels have no known range; convert to 8 or 16 bits")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ImageError(f"{title}: integer pixels must lie in [0, 65535], got up to {values.max()}")
        picture = PIL.Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if mode == "RGBA":
            return picture
        under = PIL.Image.new("RGBA", picture.size, (*background, 255))
        picture = PIL.Image.alpha_composite(under, picture)
    return picture.copy() if picture.mode == mode else picture.convert(mode)


def check_format(path: str | Path) -> str:
    """The format of pictures that the suffix of a path names, such as "PNG".

    Raises:
        ImageError: it names none.
    """
    path = Path(path)
    image_format = PIL.Image.registered_extensions().get(path.suffix.lower())
    if image_format is None:
        raise ImageError(f"{path}: no picture format is known for the suffix {path.suffix!r}; .png is one")
    return image_format


def save_image(image: PIL.Image.Image, path: str | Path, **options: object) -> None:
    """Write a picture in the format of the path's suffix, aside and then renamed, so never by halves.

    Args:
        image: the picture.
        path: where to; the folder must exist.
        options: passed to `PIL.Image.Image.save`, such as `quality=90`.
    Raises:
        ImageError: the format is unknown or cannot hold this picture.
        OSError: the file cannot be written; it names the path.
    """
    path, image_format = Path(path), check_format(path)
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=image_format, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"{path}: cannot encode mode {image.mode} as {image_format}: {error}") from error
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with open(aside, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@dataclass(frozen=True)
class Augment:
    """Random changes for training; zero or (1, 1) switches one off.

    Args:
        scale: share of the picture's area that the crop keeps, drawn uniformly.
        ratio: width / height of the crop, drawn uniformly in the logarithm. Of a picture that no such crop fits in ten draws
            the largest in the centre with the nearest ratio is taken: with (1, 1) both, the centre square of evaluation.
        translate: largest shift, as a share of the size, over `fill`.
        flip: probability of a left-right flip; it makes captions with "left" or with letters untrue.
        brightness, contrast, saturation: factor drawn from [1 − value, 1 + value].
        fill: grey of the uncovered border, 0 to 1.
        rand_augment: operations on the cropped picture before those from `translate` on; None for none.
        erase: probability of a rectangle of noise, after the normalisation.
        interpolation: of the crop, "bicubic" or "bilinear".

    Raises:
        ValueError: a value out of range.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    translate: float = 0.0
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    fill: float = 1.0
    rand_augment: RandAugment | None = None
    erase: float = 0.0
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must satisfy 0 < low <= high, got {self.ratio}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {self.interpolation!r}"
            )
        for field in ("translate", "flip", "brightness", "contrast", "saturation", "erase", "fill"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must lie in [0, 1], got {getattr(self, field)}")


class ImageTransform:
    """Picture to normalised tensor: resize (bicubic) so that the centre square, or a random crop, fills it.

    y = (x / 255 − mean) / std

    Args:
        size: height and width of the result in pixels.
        mean: one value a channel, on the scale 0 to 1; CLIP's by default.
        std: likewise, positive.
        augment: random changes for training; None for evaluation.
    Raises:
        ValueError: `size`, `mean` or `std` is out of range.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        augment: Augment | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be positive, got {size}")
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std must have 3 values each, got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {tuple(std)}")
        self.size = size
        self.augment = augment
        self.mean = np.asarray(mean, dtype=np.float32).reshape(3, 1, 1)
        self.std = np.asarray(std, dtype=np.float32).reshape(3, 1, 1)

    def __call__(self, image: PIL.Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        """Return float32 [3, size, size].

        Args:
            image: a picture; other modes are converted to RGB over white.
            generator: the only source of randomness; needed with `augment`.
        Raises:
            ValueError: `augment` is set and `generator` is not given.
        """
        if image.mode != "RGB":
            image = _convert(image, "RGB", (255, 255, 255), "image")
        square = (self.size, self.size)
        if self.augment is None:
            picture = image.resize(square, PIL.Image.Resampling.BICUBIC, box=centre_box(*image.size))
            return self._normalised(_values(picture))
        if generator is None:
            raise ValueError("generator must be given when augment is set: pass a numpy.random.Generator")
        augment, box = (
            self.augment,
            random_box(*image.size, self.augment.scale, self.augment.ratio, generator),
        )
        picture = image.resize(square, _INTERPOLATIONS[augment.interpolation], box=box)
        if augment.rand_augment is not None:
            red, green, blue = (round(255 * float(value)) for value in self.mean.flat)
            picture = augment.rand_augment(picture, generator, (red, green, blue))
        pixels = self._normalised(_change(_values(picture), augment, generator))
        if augment.erase:
            return torch.from_numpy(erase(pixels.numpy(), augment.erase, generator))
        return pixels

    def whole(self, image: PIL.Image.Image, width: int, height: int) -> torch.Tensor:
        """All of a picture, resized without a crop: float32 [3, height, width]."""
        if image.mode != "RGB":
            image = _convert(image, "RGB", (255, 255, 255), "image")
        return self._normalised(_values(image.resize((width, height), PIL.Image.Resampling.BICUBIC)))

    def _normalised(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray((pixels - self.mean) / self.std, dtype=np.float32))

    def to_image(self, tensor: torch.Tensor) -> PIL.Image.Image:
        """Undo the normalisation of a tensor [3, H, W] and return it as a picture."""
        if tensor.ndim != 3 or tensor.shape[0] != 3:
            raise ValueError(f"tensor must be [3, H, W], got {list(tensor.shape)}")
        pixels = tensor.detach().float().cpu().numpy() * self.std + self.mean
        return PIL.Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def _values(picture: PIL.Image.Image) -> np.ndarray:
    """float32 [3, H, W] in [0, 1]."""
    return np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)


def _change(pixels: np.ndarray, augment: Augment, generator: np.random.Generator) -> np.ndarray:
    """Flip, shift and recolour [3, S, S] in [0, 1]; always draws the same number of random values."""
    flip, dx, dy, brightness, contrast, saturation = generator.uniform(0, 1, size=6)
    if flip < augment.flip:
        pixels = pixels[:, :, ::-1]
    if augment.translate:
        reach = augment.translate
        pixels = _shift(pixels, (2 * dy - 1) * reach, (2 * dx - 1) * reach, augment.fill)
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    if augment.brightness:
        pixels = (pixels * (1 + (2 * brightness - 1) * augment.brightness)).clip(0, 1)
    if augment.contrast:
        grey = float(np.tensordot(weights, pixels, 1).mean())
        pixels = (grey + (pixels - grey) * (1 + (2 * contrast - 1) * augment.contrast)).clip(0, 1)
    if augment.saturation:
        greys = np.tensordot(weights, pixels, 1)[None]
        pixels = (greys + (pixels - greys) * (1 + (2 * saturation - 1) * augment.saturation)).clip(0, 1)
    return pixels


def _shift(pixels: np.ndarray, dy: float, dx: float, fill: float) -> np.ndarray:
    size = pixels.shape[1]
    rows, columns = round(dy * size), round(dx * size)
    shifted = np.full_like(pixels, fill)
    shifted[:, max(rows, 0) : size + min(rows, 0), max(columns, 0) : size + min(columns, 0)] = pixels[
        :, max(-rows, 0) : size - max(rows, 0), max(-columns, 0) : size - max(columns, 0)
    ]
    return shifted
