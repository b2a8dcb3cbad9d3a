"""Semantic object accuracy: which texts name what, what counts as found, and the detectors of scenes."""

from __future__ import annotations

import pytest
import torch

from jrl.downstream import Detection
from jrl.encoders import ImageEncoder
from jrl.evaluation.object_accuracy import ObjectClass, best_scores, named_objects, object_accuracy
from jrl.generation import (
    ClassifierDetector,
    HeadDetector,
    Judges,
    Pair,
    SceneClassifier,
    judge,
    look,
    real_pictures,
)
from tests.jrl.generation_fixtures import VIT, scenes

B = torch.tensor


def test_texts_name_classes_by_whole_words() -> None:
    classes = [
        ObjectClass("dog", ("dog", "puppy"), excluding=("hot dog", "dog house")),
        ObjectClass("hot dog"),
        ObjectClass("red circle"),
    ]
    texts = [
        "A Dog on grass",
        "dogs",
        "a hot  dog on a plate",
        "a puppy eats a hot dog",
        "a dog beside a dog house",
        "a striped red\ncircle",
        "a red square and a blue circle",
        "a hotdog",
    ]
    assert named_objects(texts, classes).tolist() == [
        [True, False, False],
        [False, False, False],
        [False, True, False],
        [True, True, False],
        [True, False, False],
        [False, False, True],
        [False, False, False],
        [False, False, False],
    ]
    with pytest.raises(ValueError, match="classes: expected at least one, got none"):
        named_objects(texts, [])
    with pytest.raises(ValueError, match="words: expected a word, got a blank one"):
        named_objects(texts, [ObjectClass("dog", (" ",))])


def test_accuracy_over_classes_and_over_pictures() -> None:
    """Class a: 3 of 4 found; b: 0 of 1; c is named nowhere, and found where nobody asked."""
    named = B([[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    found = B([[1, 1, 1], [1, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    accuracy = object_accuracy(found, named, ["a", "b", "c"])
    assert accuracy.soa_c == pytest.approx((0.75 + 0) / 2)
    assert accuracy.soa_i == pytest.approx(3 / 5)
    # of a 1 pair and of b 4 that no text names, 1 and 3 are found
    assert accuracy.unnamed == pytest.approx(4 / 5)
    assert accuracy.by_class == {"a": 0.75, "b": 0.0}
    assert accuracy.counts == {"a": 4, "b": 1}
    with pytest.raises(ValueError, match="named: expected texts that name a class, got none that does"):
        object_accuracy(found, torch.zeros_like(named), ["a", "b", "c"])
    with pytest.raises(TypeError, match=r"found: expected bool, got torch.float32"):
        object_accuracy(found.float(), named, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"found, named: expected \[N, 2\] both"):
        object_accuracy(found, named, ["a", "b"])


def test_the_best_box_of_each_class_counts() -> None:
    detections = [
        {"labels": B([1, 0, 1, 7, -1]), "scores": B([0.2, 0.4, 0.9, 1.0, 1.0])},
        {"labels": B([], dtype=torch.int64), "scores": B([])},
    ]
    torch.testing.assert_close(best_scores(detections, 3), B([[0.4, 0.9, 0.0], [0.0, 0.0, 0.0]]))


def test_captions_of_scenes_name_exactly_their_objects() -> None:
    detector = ClassifierDetector(SceneClassifier(32, 2).eval())
    samples = scenes()
    named = named_objects([sample.captions[0] for sample in samples], detector.classes)
    for row, sample in zip(named, samples, strict=True):
        said = {one.name for one, yes in zip(detector.classes, row.tolist(), strict=True) if yes}
        assert said == {f"{thing.attributes[-1]} {thing.label}" for thing in sample.objects}


def test_a_detector_that_always_or_never_finds() -> None:
    class Constant:
        classes = (ObjectClass("circle"), ObjectClass("star"))
        threshold = 0.5

        def __init__(self, score: float) -> None:
            self.score = score

        def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
            assert pictures.dtype == torch.float32 and float(pictures.max()) <= 1
            return torch.full((len(pictures), 2), self.score)

    pairs = [Pair(sample.key, sample.captions[0], sample.image) for sample in scenes()]
    for score, expected in ((0.5, 1.0), (0.4, 0.0)):
        judges = Judges(detector=Constant(score))
        seen = look(real_pictures(pairs, 32), judges)
        scores = judge(seen, None, [pair.text for pair in pairs], judges)
        assert scores.soa_c == scores.soa_i == expected
        assert scores.fid is scores.r_precision is None


def test_the_scores_of_both_detectors_of_scenes() -> None:
    pictures = torch.rand(2, 3, 32, 32)
    classifier = SceneClassifier(32, 2).eval()
    torch.testing.assert_close(ClassifierDetector(classifier)(pictures), classifier(pictures)[1].exp())
    encoder = ImageEncoder(VIT).eval()
    head = Detection(16).head(16, 16).eval()
    found = HeadDetector(encoder, head, (0.5,) * 3, (0.25,) * 3).eval()(pictures)
    from jrl.downstream import token_map

    logits, _ = head(token_map(encoder((pictures - 0.5) / 0.25).tokens))
    torch.testing.assert_close(found, logits.sigmoid().amax(dim=1))
    assert found.shape == (2, 8)
    with pytest.raises(ValueError, match="detector: expected evaluation mode"):
        look([], Judges(detector=ClassifierDetector(SceneClassifier(32, 2))))
