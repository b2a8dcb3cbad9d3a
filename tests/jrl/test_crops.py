"""Pictures that are not square: crops keep their shape, and a whole one is the same wherever it is made."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from jrl.data.crops import random_box
from jrl.data.images import Augment, ImageTransform
from jrl.data.sample import Sample, SkipReport
from jrl.generation import Pair, real_pictures
from jrl.training.sources import decode_all

PLAIN: tuple[tuple[float, ...], tuple[float, ...]] = ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (32, 32)])
def test_a_whole_square_is_the_same_in_training_in_memory_and_in_evaluation(size: tuple[int, int]) -> None:
    """With scale and ratio (1, 1): undistorted, and in the centre."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = PIL.Image.fromarray(values)
    evaluated = ImageTransform(32, *PLAIN)(image)
    whole = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    for seed in range(4):
        trained = ImageTransform(32, *PLAIN, whole)(image, np.random.default_rng(seed))
        torch.testing.assert_close(trained, evaluated)
    pixels, _ = decode_all([Sample("a", image, ["x"], ["en"])], 32, SkipReport())
    torch.testing.assert_close(pixels[0] / 255, evaluated, atol=1 / 255, rtol=0)
    (real,) = real_pictures([Pair("a", "x", image)], 32)
    assert torch.equal(real, pixels)


def test_crops_keep_their_ratio_and_lie_inside() -> None:
    """Drawn crops that fit are taken as they are; where none does, the largest with the nearest ratio, in the centre."""
    shapes, source = ((0.2, 1.0), (3 / 4, 4 / 3)), np.random.default_rng(0)
    boxes = [random_box(64, 48, *shapes, source) for _ in range(300)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 48
        assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9
    assert len({box[0] for box in boxes}) > 250
    assert random_box(100, 10, *shapes, source) == pytest.approx((50 - 20 / 3, 0, 50 + 20 / 3, 10))
    assert random_box(10, 100, *shapes, source) == pytest.approx((0, 50 - 20 / 3, 10, 50 + 20 / 3))
