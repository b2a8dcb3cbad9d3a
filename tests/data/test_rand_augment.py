"""RandAugment and random erasing: what each operation does, how often, and that a seed repeats it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from jrl.data.images import Augment, ImageTransform
from jrl.data.rand_augment import OPERATIONS, RandAugment
from jrl.data.random_erasing import erase
from jrl.training.augment import augment_batch

FILL = (124, 116, 104)


def ramp() -> PIL.Image.Image:
    """Every value once in red, from the other end in green, and a middle blue."""
    red = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return PIL.Image.fromarray(np.stack([red, 255 - red, np.full_like(red, 90)], axis=-1))


def change(name: str, strength: float, sign: int = 1, picture: PIL.Image.Image | None = None) -> np.ndarray:
    return np.asarray(OPERATIONS[name](ramp() if picture is None else picture, strength, sign, FILL)).astype(
        int
    )


def test_operations_by_hand() -> None:
    before = np.asarray(ramp()).astype(int)
    assert len(OPERATIONS) == 15
    assert np.array_equal(change("invert", 0.9), 255 - before)
    # at 0.9, one bit is left; at the end none, which is black
    assert np.array_equal(change("posterize", 0.9), before & 128)
    assert np.array_equal(change("posterize", 0.2), before & 240)
    assert not change("posterize", 1.0).any()
    # 256 − ⌊230.4⌋ = 26
    assert np.array_equal(change("solarize", 0.9), np.where(before < 26, before, 255 - before))
    assert np.array_equal(change("solarize_add", 0.9), np.where(before < 128, before + 99, before))
    # 1 ± 0.81, of which no less than a tenth is left
    assert np.allclose(change("brightness", 0.9, 1), np.minimum(before * 1.81, 255), atol=1)
    assert np.allclose(change("brightness", 0.9, -1), before * 0.19, atol=1)
    assert np.allclose(change("brightness", 1.0, -1), before * 0.1, atol=1)
    grey = np.asarray(ramp().convert("L")).astype(int)[..., None]
    assert np.allclose(change("color", 0.9, -1), grey + 0.19 * (before - grey), atol=1)
    assert np.allclose(change("contrast", 1.0, -1), round(grey.mean()) * 0.9 + 0.1 * before, atol=1)
    dull = PIL.Image.fromarray((np.asarray(ramp()) // 4 + 60).astype(np.uint8)).resize((96, 96))
    for name in ("auto_contrast", "equalize"):
        assert np.ptp(change(name, 0.9, picture=dull)[..., 0]) > 3 * np.ptp(np.asarray(dull)[..., 0]) > 0
    # a spot of 100 on 50 stands out by more or by less; its mean with its neighbours weighs it 5 of 13
    spot = np.full((5, 5, 3), 50, np.uint8)
    spot[2, 2] = 100
    smooth = 50 + 50 * 5 / 13
    for sign, factor in ((1, 1.81), (-1, 0.19)):
        found = change("sharpness", 0.9, sign, PIL.Image.fromarray(spot))
        assert np.allclose(found[2, 2], smooth + factor * (100 - smooth), atol=1.5)


def test_moves_by_hand() -> None:
    before = np.asarray(ramp()).astype(int)
    # 0.45 · 16 · (5 / 9) = 4 pixels: what was at x + 4 comes to x
    moved = change("translate_x", 5 / 9, 1)
    assert np.abs(moved[:, :12] - before[:, 4:]).max() <= 1 and (moved[:, 12:] == FILL).all()
    moved = change("translate_y", 5 / 9, -1)
    assert np.abs(moved[4:] - before[:12]).max() <= 1 and (moved[:4] == FILL).all()
    wide = PIL.Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    sheared = change("shear_x", 1.0, 1, wide)
    # row y moves by 0.3 y to the left
    assert np.abs(sheared[20, 5:50, 0] - (np.arange(5, 50) + 0.3 * 20.5)).max() < 1.1
    tall = PIL.Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 32, 3)))
    sheared = change("shear_y", 1.0, -1, tall)
    assert np.abs(sheared[15:50, 20, 0] - (np.arange(15, 50) - 0.3 * 20.5)).max() < 1.1
    turned = change("rotate", 1.0, 1, PIL.Image.new("RGB", (20, 20), "white"))
    assert (turned[10, 10] == 255).all() and (turned[0, 0] == FILL).all()
    theta = math.radians(30)
    corner = round(10 + 9 * math.cos(theta)), round(10 - 9 * math.sin(theta))
    assert (turned[corner[1], corner[0]] == 255).all()


def test_operations_are_drawn_evenly_and_applied_half_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []
    for name in OPERATIONS:

        def note(
            picture: PIL.Image.Image, strength: float, sign: int, fill: object, name: str = name
        ) -> PIL.Image.Image:
            seen.append((name, strength, sign))
            return picture

        monkeypatch.setitem(OPERATIONS, name, note)
    generator, picture = np.random.default_rng(0), ramp()
    for _ in range(3000):
        RandAugment()(picture, generator)
    counts = Counter(name for name, _, _ in seen)
    # 6000 drawn, half of them applied: 200 of each, with a standard deviation of 14
    assert len(seen) == pytest.approx(3000, abs=200) and all(
        abs(count - 200) < 70 for count in counts.values()
    )
    assert len(counts) == 15
    strengths = np.array([strength for _, strength, _ in seen])
    assert strengths.mean() == pytest.approx(0.9, abs=0.005) and strengths.max() == 1.0
    assert np.std(strengths) == pytest.approx(0.05, abs=0.005)
    assert abs(np.mean([sign for _, _, sign in seen])) < 0.07
    seen.clear()
    RandAugment(operations=5, magnitude=3, magnitude_std=0.0, probability=1.0)(picture, generator)
    assert [round(strength, 6) for _, strength, _ in seen] == [0.3] * 5
    RandAugment(probability=0.0)(picture, generator)
    assert len(seen) == 5


def test_erasing_covers_a_rectangle_of_noise() -> None:
    generator = np.random.default_rng(0)
    pixels = np.full((3, 40, 60), 7.0, np.float32)
    shares, ratios, noise = [], [], []
    for _ in range(400):
        erased = erase(pixels, 1.0, generator)
        changed = (erased != 7).all(axis=0)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        tall, wide = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert changed.sum() == tall * wide
        shares.append(tall * wide / 2400)
        ratios.append(tall / wide)
        noise.append(erased[:, changed].ravel())
    assert 0.015 < min(shares) < 0.04 and 0.3 < max(shares) < 0.36
    assert 0.25 < min(ratios) < 0.4 and 2.3 < max(ratios) < 3.8
    values = np.concatenate(noise)
    assert abs(values.mean()) < 0.01 and values.std() == pytest.approx(1, abs=0.01)
    assert (pixels == 7).all()
    kept = sum(erase(pixels, 0.25, generator) is pixels for _ in range(2000))
    assert kept == pytest.approx(1500, abs=80)
    # a line has no room for a rectangle
    assert erase(np.zeros((3, 1, 50), np.float32), 1.0, generator).any() is np.False_


def test_a_transform_augments_by_its_generator_alone() -> None:
    augment = Augment((0.08, 1.0), flip=0.5, rand_augment=RandAugment(), erase=0.25, interpolation="bilinear")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = ImageTransform(24, mean, std, augment)
    picture = ramp().resize((90, 60), PIL.Image.Resampling.NEAREST)
    first, again, other = (transform(picture, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.float32 and first.shape == (3, 24, 24)
    assert torch.equal(first, again) and not torch.equal(first, other)
    # what moves in from outside is the mean of the normalisation: nothing, but for rounding
    sure = Augment((1.0, 1.0), (1.0, 1.0), rand_augment=RandAugment(1, probability=1.0))
    moved = [
        ImageTransform(24, mean, std, sure)(picture.resize((24, 24)), np.random.default_rng(seed))
        for seed in range(60)
    ]
    assert sum(bool((one.abs().amax(dim=0) < 0.02).any()) for one in moved) > 5
    plain = ImageTransform(24, mean, std)
    assert torch.equal(plain.whole(picture.resize((24, 24)), 24, 24), plain(picture.resize((24, 24))))
    assert plain.whole(picture, 31, 17).shape == (3, 17, 31)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RandAugment(operations=0), "operations"),
        (lambda: RandAugment(magnitude=11), "magnitude"),
        (lambda: RandAugment(magnitude_std=-1), "magnitude_std"),
        (lambda: RandAugment(probability=2), "probability"),
        (lambda: Augment(erase=2), "erase"),
        (lambda: Augment(interpolation="lanczos"), "interpolation must be one of bicubic, bilinear"),
        (
            lambda: augment_batch(torch.zeros(1, 3, 4, 4), Augment(erase=0.5), torch.Generator()),
            "set in_memory to false",
        ),
    ],
)
def test_errors(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
