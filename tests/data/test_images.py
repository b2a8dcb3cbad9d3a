"""Opening, saving and transforming pictures."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from jrl.data.images import (
    EMPTY,
    MISSING,
    TOO_LARGE,
    UNREADABLE,
    Augment,
    ImageError,
    ImageTransform,
    load_image,
    save_image,
)
from tests.data.fixtures import bomb_png, encoded, jpeg, picture, truncated_jpeg


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "image", "function"])
def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path, kind: str) -> None:
    image = picture((1, 2, 3))
    path = write(tmp_path / "ünï 写真.png", encoded(image, "PNG"))
    source: Any = {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "image": image,
        "function": lambda: PIL.Image.open(path),
    }[kind]
    loaded = load_image(source)
    assert loaded.mode == "RGB"
    assert loaded.size == (12, 8)
    assert loaded.getpixel((0, 0)) == (1, 2, 3)
    assert loaded is not image


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (b"", EMPTY, "empty"),
        (b"<html>404 Not Found</html>", UNREADABLE, "not a picture"),
        (truncated_jpeg(), UNREADABLE, "cannot decode"),
        (jpeg()[:20], UNREADABLE, ""),
        (encoded(picture(), "PNG")[:50], UNREADABLE, "cannot decode"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", UNREADABLE, "not a picture"),
    ],
    ids=["zero bytes", "html", "cut scan", "cut header", "cut png", "postscript"],
)
def test_a_broken_file_is_an_error_that_names_it(
    tmp_path: Path, data: bytes, reason: str, words: str
) -> None:
    path = write(tmp_path / "broken.jpg", data)
    with pytest.raises(ImageError, match="broken.jpg") as caught:
        load_image(path)
    assert caught.value.reason == reason
    assert words in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [50_000, 10_000])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    data = bomb_png(side, side)
    assert len(data) < 1000
    path = write(tmp_path / "bomb.png", data)
    for source in (path, data):
        with pytest.raises(ImageError) as caught:
            load_image(source, name="bomb.png")
        assert caught.value.reason == TOO_LARGE
        assert "bomb.png" in str(caught.value)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_pillows_warning_made_an_error_is_still_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="bomb.png"):
        load_image(write(tmp_path / "bomb.png", bomb_png(10_000, 10_000)))


def test_max_pixels_is_a_sharp_limit() -> None:
    assert load_image(jpeg(), max_pixels=96).size == (12, 8)
    with pytest.raises(ImageError, match="12x8 is 96 pixels, more than max_pixels=95"):
        load_image(jpeg(), max_pixels=95)
    for limit in (0, 10**9):
        with pytest.raises(ValueError, match="max_pixels must be in"):
            load_image(jpeg(), max_pixels=limit)


def test_missing_file_wrong_type_and_wrong_mode(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="gone.jpg.*no such file") as caught:
        load_image(tmp_path / "gone.jpg")
    assert caught.value.reason == MISSING
    with pytest.raises(ImageError, match="cannot open"):
        load_image(tmp_path)
    with pytest.raises(TypeError, match="source must be a path, bytes.* got int"):
        load_image(3)
    with pytest.raises(TypeError, match="must return a PIL image, got str"):
        load_image(lambda: "no")
    with pytest.raises(ValueError, match="mode must be one of RGB, RGBA, L, got 'CMYK'"):
        load_image(jpeg(), mode="CMYK")


def test_transparency_is_composited_and_kept_for_rgba() -> None:
    clear = PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    data = encoded(clear, "PNG")
    assert load_image(data).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(data, background=(0, 0, 9)).getpixel((0, 0)) == (0, 0, 9)
    assert load_image(data, mode="RGBA").getpixel((0, 0)) == (255, 0, 0, 0)


def test_palette_with_a_transparent_entry_and_grey_with_alpha() -> None:
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putdata([0, 1])
    loaded = load_image(encoded(palette, "PNG", transparency=1))
    assert loaded.getpixel((0, 0)) == (10, 20, 30)
    assert loaded.getpixel((1, 0)) == (255, 255, 255)
    assert load_image(encoded(PIL.Image.new("LA", (2, 2), (7, 0)), "PNG")).getpixel((0, 0)) == (255,) * 3


def test_cmyk_is_converted() -> None:
    loaded = load_image(encoded(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = loaded.getpixel((0, 0))  # type: ignore[misc]
    assert loaded.mode == "RGB"
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(PIL.Image.fromarray(values), "PNG"), mode="L")
    assert np.asarray(loaded).tolist() == [[0, 100, 255]]


def test_pixels_without_a_known_range_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point pixels"):
        load_image(encoded(PIL.Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))
    with pytest.raises(ImageError, match=r"\[0, 65535\], got up to 70000"):
        load_image(encoded(PIL.Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"))


def test_exif_orientation_is_applied() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(picture(size=(12, 8)), exif=exif)).size == (8, 12)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [picture((255, 0, 0)), picture((0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_save_image_round_trip_and_errors(tmp_path: Path) -> None:
    save_image(picture((9, 8, 7)), tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (9, 8, 7)
    with pytest.raises(ImageError, match=r"a.xyz: no picture format"):
        save_image(picture(), tmp_path / "a.xyz")
    with pytest.raises(ImageError, match=r"a.jpg: cannot encode mode RGBA as JPEG"):
        save_image(PIL.Image.new("RGBA", (2, 2)), tmp_path / "a.jpg")
    with pytest.raises(OSError, match="nowhere"):
        save_image(picture(), tmp_path / "nowhere" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    save_image(picture((1, 1, 1)), path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*a\.png") as caught:
        save_image(picture((2, 2, 2)), path)
    assert caught.value.errno == errno.ENOSPC
    assert load_image(path).getpixel((0, 0)) == (1, 1, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def gradient(width: int, height: int) -> PIL.Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1), columns * 0], -1)
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def test_evaluation_normalises_the_centre_square() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    image = gradient(24, 8)
    tensor = ImageTransform(8, mean, std)(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 8, 8)
    pixels = torch.from_numpy(np.array(image.crop((8, 0, 16, 8)))).permute(2, 0, 1) / 255
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 200)])
def test_extreme_shapes_are_resized(size: tuple[int, int]) -> None:
    assert ImageTransform(16)(gradient(*size)).shape == (3, 16, 16)
    generator = np.random.default_rng(0)
    augment = Augment(scale=(0.01, 1.0), translate=1.0)
    for _ in range(20):
        assert torch.isfinite(ImageTransform(16, augment=augment)(gradient(*size), generator)).all()


def test_augmentation_follows_the_generator_alone() -> None:
    augment = Augment((0.3, 1.0), translate=0.2, flip=0.5, brightness=0.3, contrast=0.3, saturation=0.3)
    transform, image = ImageTransform(16, augment=augment), gradient(40, 30)
    first = transform(image, np.random.default_rng([1, 2, 3]))
    assert torch.equal(first, transform(image, np.random.default_rng([1, 2, 3])))
    assert not torch.equal(first, transform(image, np.random.default_rng([1, 2, 4])))
    with pytest.raises(ValueError, match="generator must be given when augment is set"):
        transform(image)


OFF = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))


@pytest.mark.parametrize(
    "augment",
    [
        Augment(scale=(0.2, 0.3), ratio=(1.0, 1.0)),
        Augment(scale=(0.5, 0.5), ratio=(0.5, 0.6)),
        Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0),
        Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), translate=0.3),
        Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), brightness=0.5),
        Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), contrast=0.5),
        Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), saturation=0.5),
    ],
)
def test_every_augmentation_does_something(augment: Augment) -> None:
    image = gradient(16, 16)
    plain = ImageTransform(16, augment=OFF)(image, np.random.default_rng(0))
    torch.testing.assert_close(plain, ImageTransform(16)(image))
    changed = ImageTransform(16, augment=augment)(image, np.random.default_rng(0))
    assert (changed - plain).abs().max() > 0.05


def test_flip_and_fill_are_what_they_say() -> None:
    image = gradient(16, 16)
    flipped = ImageTransform(16, augment=Augment((1, 1), (1, 1), flip=1.0))(image, np.random.default_rng(0))
    torch.testing.assert_close(flipped, ImageTransform(16)(image).flip(-1))
    shift = ImageTransform(16, (0, 0, 0), (1, 1, 1), Augment((1, 1), (1, 1), translate=1.0, fill=0.25))
    assert any(
        bool((shift(picture((0, 0, 0), (16, 16)), np.random.default_rng(seed)) == 0.25).any())
        for seed in range(3)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"brightness": -0.1}, "brightness"),
    ],
)
def test_augment_refuses_bad_values(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Augment(**options)


def test_transform_refuses_bad_values() -> None:
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        ImageTransform(0)
    with pytest.raises(ValueError, match="3 values each"):
        ImageTransform(8, (0.5,))
    with pytest.raises(ValueError, match="std must be positive"):
        ImageTransform(8, std=(1.0, 0.0, 1.0))


def test_to_image_undoes_the_normalisation() -> None:
    transform, image = ImageTransform(16), gradient(16, 16)
    assert np.array_equal(np.asarray(transform.to_image(transform(image))), np.asarray(image))
    with pytest.raises(ValueError, match=r"tensor must be \[3, H, W\], got \[16, 16\]"):
        transform.to_image(torch.zeros(16, 16))
