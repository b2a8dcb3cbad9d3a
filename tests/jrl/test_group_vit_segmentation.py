"""Zero-shot segmentation: group maps, class scores, windows, and the scores of a segmentation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.data.scenes import read_scenes
from jrl.encoders.group_vit_blocks import GroupMap
from jrl.evaluation.segmentation import SegmentationScore, class_mask, scene_label, trivial_baselines
from jrl.systems import GroupViT
from jrl.systems.group_vit_segmentation import class_scores, compose, slide, upsample
from tests.jrl.group_vit_fixtures import perturb, small_group_vit


def system() -> GroupViT:
    built = small_group_vit()
    perturb(built)
    return built.train()  # every answer below is that of evaluation


def classes(count: int) -> Tensor:
    return F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(3)), dim=1)


def test_maps_are_distributions_and_products_of_their_stages() -> None:
    built = system()
    maps = built.group_maps(torch.randn(2, 3, 16, 24))
    assert maps.grid == (4, 6)
    for soft, hard in zip((*maps.soft, maps.product), (*maps.hard, maps.hard_product), strict=True):
        torch.testing.assert_close(soft.sum(dim=-1), torch.ones(soft.shape[:2]))
        assert set(hard.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(hard.sum(dim=-1), torch.ones(hard.shape[:2]))
    for soft, hard in zip(maps.soft, maps.hard, strict=True):
        assert torch.equal(hard.argmax(dim=-1), soft.argmax(dim=-1))
    for patch in range(24):
        first = int(maps.hard[0][0, patch].argmax())
        assert maps.hard_product[0, patch].argmax() == maps.hard[1][0, first].argmax()
    torch.testing.assert_close(maps.product, maps.soft[0] @ maps.soft[1])
    assert built.training


def test_maps_grow_to_the_pixels_and_lose_the_continued_border() -> None:
    map_ = torch.rand(1, 6, 2)
    grown = upsample(map_, (2, 3), 4, (7, 10))
    assert grown.shape == (1, 2, 7, 10)
    whole = F.interpolate(map_.mT.reshape(1, 2, 2, 3), (8, 12), mode="bilinear", align_corners=False)
    assert torch.equal(grown, whole[:, :, :7, :10])


def by_hand(
    segments: Tensor,
    image: Tensor,
    names: Tensor,
    pixels: Tensor,
    scale: float,
    top_k: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """p₀ p₁ of one picture, pixel by pixel; and which pixels are background."""
    near = sorted(range(len(names)), key=lambda c: -float(image @ names[c]))[:top_k]
    scores = torch.zeros(len(names), *pixels.shape[1:])
    for y in range(pixels.shape[1]):
        for x in range(pixels.shape[2]):
            group = segments[int(pixels[:, y, x].argmax())]
            exponents = [math.exp(scale * float(group @ name)) for name in names]
            for c in near:
                scores[c, y, x] = (
                    exponents[c] / sum(exponents) * exponents[c] / sum(exponents[k] for k in near)
                )
    near_sums = [sum(math.exp(scale * float(group @ names[k])) for k in near) for group in segments]
    best = max(
        math.exp(2 * scale * float(group @ names[c]))
        / sum(math.exp(scale * float(group @ name)) for name in names)
        / near_sum
        for group, near_sum in zip(segments, near_sums, strict=True)
        for c in near
    )
    # float32 of the score itself, where the best group is the pixel's own
    return scores, scores.amax(dim=0) < min(threshold, best * (1 - 1e-6))


def test_class_scores_are_those_of_the_code() -> None:
    torch.manual_seed(0)
    segments, image = F.normalize(torch.randn(2, 4, 6), dim=-1), F.normalize(torch.randn(2, 6), dim=-1)
    names, pixels = F.normalize(torch.randn(7, 6), dim=-1), torch.rand(2, 4, 3, 5)
    for threshold in (0.2, 0.99):
        found = class_scores(
            segments, image, names, pixels, scale=8.0, mode="code", top_k=3, background_threshold=threshold
        )
        for row in range(2):
            scores, background = by_hand(segments[row], image[row], names, pixels[row], 8.0, 3, threshold)
            torch.testing.assert_close(found[row, 1:], scores, rtol=1e-4, atol=1e-6)
            assert torch.equal(found[row, 0].bool(), background)
            assert not background.all()  # the pixels of the best group are never background
    # where the best group has won no pixel, all of the picture may be background
    certain = (8.0 * segments[0] @ names.T).softmax(dim=-1).amax(dim=-1)
    winner = int(certain.argmin())
    pixels = torch.zeros(1, 4, 3, 5)
    pixels[:, winner] = 1.0
    found = class_scores(
        segments[:1], image[:1], names, pixels, scale=8.0, mode="code", top_k=None, background_threshold=0.99
    )
    assert (found[:, 0] == 1).all()


def test_modes_products_and_thresholds_of_a_segmentation() -> None:
    built, pixels, names = system(), torch.randn(2, 3, 18, 23), classes(7)
    found = built.segment(pixels, names, background_threshold=0.9, top_k=2)
    assert found.scores.shape == (2, 7, 18, 23)
    assert found.background is not None
    assert torch.equal(found.index == -1, found.background == 1)
    kept = found.index >= 0
    assert torch.equal(found.index[kept], found.scores.argmax(dim=1)[kept])
    # two classes at most are left in a picture
    assert all((found.scores[row].flatten(1).sum(dim=1) > 0).sum() <= 2 for row in range(2))
    free = built.segment(pixels, names, top_k=None)
    assert free.background is None and int(free.index.min()) >= 0
    patent = built.segment(pixels, names, mode="patent")
    maps, built_eval = built.group_maps(pixels), built.eval()
    tokens = built_eval.encode_image(pixels).tokens
    cosines = (
        F.normalize(built_eval.image_projection(tokens.flatten(0, 1)), dim=-1).unflatten(0, (2, 3)) @ names.T
    )
    winner = upsample(maps.hard_product, maps.grid, 4, (18, 23)).argmax(dim=1)
    for row in range(2):
        torch.testing.assert_close(patent.scores[row], cosines[row][winner[row]].permute(2, 0, 1))
    soft = built.segment(pixels, names, mode="patent", product="soft")
    assert not torch.equal(soft.scores, patent.scores)


def test_windows_cover_a_large_picture_and_average() -> None:
    pixels = torch.arange(35.0).reshape(1, 1, 5, 7).expand(1, 3, 5, 7)
    seen: list[tuple[int, int]] = []

    def score(window: Tensor) -> Tensor:
        seen.append((window.shape[2], window.shape[3]))
        return window[:, :1] + len(seen)

    out = slide(score, pixels, 4, 2)
    # rows begin at 0 and 1, columns at 0, 2 and 3
    assert seen == [(4, 4)] * 6
    numbers = torch.zeros(5, 7)
    count = torch.zeros(5, 7)
    for number, (top, left) in enumerate([(y, x) for y in (0, 1) for x in (0, 2, 3)], start=1):
        numbers[top : top + 4, left : left + 4] += number
        count[top : top + 4, left : left + 4] += 1
    torch.testing.assert_close(out[0, 0], pixels[0, 0] + numbers / count)
    seen.clear()
    slide(score, pixels, 9, 3)
    assert seen == [(5, 7)]
    built, names, large = system(), classes(3), torch.randn(1, 3, 24, 40)
    found = built.segment(large, names, window=16, stride=8, background_threshold=0.5)
    assert found.index.shape == (1, 24, 40)
    assert found.background is not None and 0 <= found.background.min() <= found.background.max() <= 1
    whole = built.segment(large, names, window=64)
    assert torch.equal(whole.index, built.segment(large, names).index)


def test_iou_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 255]])
    said = torch.tensor([[0, 1, 1, 0], [0, 2, 1, 3]])
    score = SegmentationScore(5)
    score.update(said[:1], truth[:1])
    score.update(said[1:], truth[1:])
    values = score.compute()
    # background 2/4, class 1: 1/4, class 2: 1/2; classes 3 and 4 occur nowhere that counts
    assert values["mean_iou"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 2) / 3)
    assert values["background_iou"] == pytest.approx(2 / 4)
    assert values["pixel_accuracy"] == pytest.approx(4 / 7)
    # among the four pixels of objects: class 1 has 1 right of 3, class 2 has 1 of 2
    assert values["foreground_iou"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert set(SegmentationScore(3).compute().values()) == {0.0}


def test_trivial_answers() -> None:
    truth = torch.zeros(6, 8, 8, dtype=torch.int64)
    truth[:, :2, :4] = 1
    truth[:, 7, 7] = 255
    found = trivial_baselines(truth, 4)
    # the background everywhere is right on 55 of 63 pixels; the other class that occurs has none
    assert found["single_class"]["mean_iou"] == pytest.approx(55 / 63 / 2)
    assert 0 < found["random_groups"]["mean_iou"] < found["single_class"]["mean_iou"]
    assert trivial_baselines(truth, 4) == found


def test_masks_of_scenes_name_their_classes() -> None:
    samples = read_scenes(train=3, val=0, test=0, test_compositional=0, size=32, languages=["en"])
    for sample in samples:
        names = sorted({scene_label(thing) for thing in sample.objects})
        mask, objects = class_mask(sample, names, scene_label), torch.from_numpy(sample.load_mask())
        for thing in sample.objects:
            colour, shape = names[int(mask[objects == thing.mask_id][0]) - 1].split()
            assert shape == thing.label and colour in thing.attributes
        assert torch.equal(mask == 0, objects == 0)
        assert (class_mask(sample, [], scene_label)[objects > 0] == 255).all()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda s, x: s.segment(x, classes(3), mode="paper"), "mode"),
        (lambda s, x: s.segment(x, classes(3), product="max"), "product"),
        (lambda s, x: s.segment(x, torch.zeros(3, 7)), "classes"),
        (lambda s, x: s.segment(x, torch.zeros(0, 16)), "classes"),
        (lambda s, x: s.segment(x, classes(3), top_k=0), "top_k"),
        (lambda s, x: s.segment(x, classes(3), background_threshold=1.5), "background_threshold"),
        (
            lambda s, x: s.segment(x, classes(3), mode="patent", background_threshold=0.5),
            "background_threshold",
        ),
        (lambda s, x: s.segment(x, classes(3), stride=2), "stride"),
        (lambda s, x: s.segment(x, classes(3), window=16, stride=17), "left out"),
        (lambda s, x: s.segment(x, classes(3), window=0), "window"),
        (lambda s, x: s.word_regions(x, torch.ones(2, 4).long()), "input_ids"),
        (lambda s, x: compose([GroupMap(None, torch.zeros(1, 4).long(), 2)], (2, 2)), "soft"),
        (lambda s, x: SegmentationScore(1), "classes"),
        (lambda s, x: SegmentationScore(3).update(torch.zeros(2, 2), torch.zeros(2, 3)), "prediction"),
        (lambda s, x: SegmentationScore(3).update(torch.full((2, 2), 3), torch.zeros(2, 2)), "prediction"),
        (lambda s, x: SegmentationScore(3).update(torch.zeros(2, 2), torch.full((2, 2), 9)), "truth"),
    ],
)
def test_bad_input(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(small_group_vit(), torch.zeros(1, 3, 16, 16))
