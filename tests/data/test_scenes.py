from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jrl.data.sample import Sample, SampleSet
from jrl.data.scenes import Scene, held_out_pairs, make_scene, read_scenes
from jrl.data.scenes_drawing import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    SHAPES,
    TEXTURES,
    Shape,
    draw_mask,
    draw_scene,
)
from jrl.data.scenes_grammar import LANGUAGES, RELATIONS, NounPhrase, describe, noun_phrase, relate

SIDE = 64


@pytest.fixture(scope="module")
def scenes() -> SampleSet:
    return read_scenes(train=300, val=20, test=20, test_compositional=60, size=SIDE, seed=3)


def _picture(sample: Sample) -> np.ndarray:
    assert callable(sample.image)
    return np.asarray(sample.image()).astype(int)


_PHRASE = re.compile(
    r"an? (?:(?P<size>small|large) )?(?:(?P<texture>striped|dotted|checkered) )?(?P<colour>\w+) (?P<shape>\w+)"
)
_RELATED = re.compile(r"(an? [\w ]+?) (?:to the )?(left of|right of|above|below|inside) (an? [\w ]+)")


def _fits(phrase: str, sample: Sample, number: int) -> bool:
    said = _PHRASE.fullmatch(phrase)
    assert said is not None, phrase
    thing = sample.objects[number]
    size, texture, colour = thing.attributes
    return (
        said["shape"] == thing.label
        and said["colour"] == colour
        and said["size"] in (None, size)
        and said["texture"] in (None, texture)
    )


def _holds(a: tuple[float, ...], name: str, b: tuple[float, ...]) -> bool:
    return {
        "left of": a[2] <= b[0],
        "right of": a[0] >= b[2],
        "above": a[3] <= b[1],
        "below": a[1] >= b[3],
        "inside": a[0] > b[0] and a[1] > b[1] and a[2] < b[2] and a[3] < b[3],
    }[name]


def test_english_captions_are_true(scenes: SampleSet) -> None:
    names: Counter[str] = Counter()
    for sample in scenes:
        english = [c for c, code in zip(sample.captions, sample.languages, strict=True) if code == "en"]
        listing = re.sub(r" on a (\w+) background$", "", english[0])
        background = re.search(r" on a (\w+) background$", english[0])
        if background is not None:
            assert background[1] == sample.metadata["background"]
        phrases = re.split(r", | and ", listing)
        assert len(phrases) == len(sample.objects)
        assert all(_fits(phrase, sample, i) for i, phrase in enumerate(phrases))
        for caption in english[1:]:
            match = _RELATED.fullmatch(caption)
            assert match is not None, caption
            names[match[2]] += 1
            assert any(
                _fits(match[1], sample, i)
                and _fits(match[3], sample, j)
                and _holds(sample.objects[i].box, match[2], sample.objects[j].box)
                for i in range(len(sample.objects))
                for j in range(len(sample.objects))
                if i != j
            ), caption
    assert set(names) == set(RELATIONS)


def test_relations_agree_with_the_masks(scenes: SampleSet) -> None:
    for sample in scenes:
        mask = sample.load_mask()
        assert mask is not None
        for i, name, j in sample.relations:
            assert _holds(sample.objects[i].box, name, sample.objects[j].box)
            (ya, xa), (yb, xb) = (np.nonzero(mask == n + 1) for n in (i, j))
            centre_a, centre_b = (xa.mean(), ya.mean()), (xb.mean(), yb.mean())
            if name in ("left of", "right of"):
                assert (centre_a[0] < centre_b[0]) == (name == "left of")
            elif name in ("above", "below"):
                assert (centre_a[1] < centre_b[1]) == (name == "above")


def test_phrases_name_their_objects(scenes: SampleSet) -> None:
    for sample in scenes:
        linked: Counter[int] = Counter()
        for phrase in sample.phrases:
            caption, language = sample.captions[phrase.caption], sample.languages[phrase.caption]
            words = caption[phrase.start : phrase.end]
            (number,) = phrase.objects
            thing = sample.objects[number]
            size, texture, colour = thing.attributes
            options = {
                noun_phrase(language, NounPhrase(thing.label, colour, s, t), after_relation=after)
                for s in {"", "" if size == "medium" else size}
                for t in {"", "" if texture == "plain" else texture}
                for after in (False, True)
            }
            assert words in options
            linked[phrase.caption] += 1
        for number, caption in enumerate(sample.captions):
            assert linked[number] in (2, len(sample.objects)), caption
        assert len(sample.captions) in (4, 8)
        assert sorted(set(sample.languages)) == sorted(LANGUAGES)


def test_masks_boxes_and_colours(scenes: SampleSet) -> None:
    for sample in scenes.select("train")[:150]:
        mask, picture = sample.load_mask(), _picture(sample)
        assert mask is not None
        assert mask.shape == (SIDE, SIDE)
        assert set(np.unique(mask)) == {0, *(thing.mask_id for thing in sample.objects)}
        assert (picture[mask == 0] == BACKGROUNDS[sample.metadata["background"]]).all(axis=1).mean() > 0.9
        for thing in sample.objects:
            ys, xs = np.nonzero(mask == thing.mask_id)
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= SIDE
            assert 0 <= y0 < y1 <= SIDE
            assert xs.min() >= x0 - 1
            assert ys.min() >= y0 - 1
            assert xs.max() <= x1
            assert ys.max() <= y1
            assert xs.max() + 1 - xs.min() >= 0.7 * (x1 - x0)
            assert ys.max() + 1 - ys.min() >= 0.7 * (y1 - y0)
            # A pattern pales a colour but keeps its hue: the darkest pixels are the pure colour.
            pixels = picture[ys, xs]
            distance = np.abs(pixels - np.array(COLOURS[thing.attributes[2]])).sum(axis=1)
            assert distance.min() < 40, thing


def test_small_and_large_differ(scenes: SampleSet) -> None:
    spans: dict[str, list[float]] = {"small": [], "medium": [], "large": []}
    for sample in scenes:
        for thing in sample.objects:
            x0, y0, x1, y1 = thing.box
            spans[thing.attributes[0]].append(max(x1 - x0, y1 - y0) / SIDE)
    assert max(spans["small"]) < min(spans["large"])
    assert np.mean(spans["small"]) < np.mean(spans["medium"]) < np.mean(spans["large"])


def test_a_scene_is_a_pure_function_of_seed_and_index() -> None:
    few = read_scenes(train=5, val=0, test=0, test_compositional=0, seed=11, size=32)
    many = read_scenes(train=9, val=3, test=0, test_compositional=0, seed=11, size=32)
    for a, b in zip(few, many[:5], strict=True):
        assert (a.key, a.captions, a.relations, a.phrases) == (b.key, b.captions, b.relations, b.phrases)
        np.testing.assert_array_equal(_picture(a), _picture(b))
    other = read_scenes(train=5, val=0, test=0, test_compositional=0, seed=12, size=32)
    assert [s.captions for s in other] != [s.captions for s in few]
    english = read_scenes(train=5, val=0, test=0, test_compositional=0, seed=11, size=32, languages=["en"])
    assert [s.captions for s in english] == [
        [c for c, code in zip(s.captions, s.languages, strict=True) if code == "en"] for s in few
    ]
    # The stream of draws is part of the data: a change of it changes everybody's scenes.
    assert [len(make_scene(0, i).shapes) for i in range(8)] == [2, 4, 4, 3, 3, 2, 2, 4]
    star = make_scene(0, 0).shapes[0]
    assert (star.shape, star.colour, star.size, star.texture) == ("star", "pink", "large", "dotted")
    assert star.x == pytest.approx(0.4857408398525968, abs=1e-12)


def test_held_out_pairs(scenes: SampleSet) -> None:
    pairs = held_out_pairs(4, 3)
    assert len({colour for colour, _ in pairs}) == len({shape for _, shape in pairs}) == 4
    shown = {
        split: [{(t.attributes[2], t.label) for t in s.objects} for s in scenes.select(split)]
        for split in scenes.splits
    }
    for split in ("train", "val", "test"):
        assert not any(kinds & pairs for kinds in shown[split])
    assert all(kinds & pairs for kinds in shown["test_compositional"])
    trained = set().union(*shown["train"])
    assert {colour for colour, _ in trained} == set(COLOURS)
    assert {shape for _, shape in trained} == set(SHAPES)
    assert held_out_pairs(4, 3) == pairs
    assert held_out_pairs(8) != held_out_pairs(8, 1)


def test_every_shape_and_texture_is_drawn() -> None:
    pictures = []
    for shape in SHAPES:
        for texture in TEXTURES:
            scene = [Shape(shape, "blue", "large", texture, 0.5, 0.5, 0.4)]
            pictures.append(np.asarray(draw_scene(scene, "white", 48)).tobytes())
            assert 0.1 < (draw_mask(scene, 48) == 1).mean() < 0.6
    assert len(set(pictures)) == len(SHAPES) * len(TEXTURES)
    for outline in OUTLINES.values():
        assert np.linalg.norm(outline(), axis=1).max() <= 1.0 + 1e-9


def test_edges_are_smooth_and_later_shapes_cover() -> None:
    disc = Shape("circle", "red", "large", "plain", 0.5, 0.5, 0.4)
    dot = Shape("circle", "blue", "small", "plain", 0.5, 0.5, 0.1)
    picture = np.asarray(draw_scene([disc, dot], "white", 32))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    assert tuple(picture[16, 16]) == COLOURS["blue"]
    assert tuple(picture[16, 8]) == COLOURS["red"]
    mask = draw_mask([disc, dot], 32)
    assert mask[16, 16] == 2
    assert mask[16, 8] == 1
    area = (mask > 0).mean()
    assert area == pytest.approx(np.pi * 0.4**2, rel=0.02)


def test_relations_of_a_nested_pair() -> None:
    outer = Shape("square", "red", "large", "plain", 0.5, 0.5, 0.3)
    inner = Shape("star", "blue", "small", "plain", 0.5, 0.5, 0.09)
    away = Shape("heart", "green", "small", "plain", 0.1, 0.5, 0.09)
    relations = Scene((outer, inner, away), "white").relations()
    assert relations == [
        (0, "right of", 2),
        (1, "inside", 0),
        (1, "right of", 2),
        (2, "left of", 0),
        (2, "left of", 1),
    ]


@pytest.mark.parametrize(
    ("language", "phrase", "after", "expected"),
    [
        ("en", NounPhrase("star", "orange", "", ""), False, "an orange star"),
        ("en", NounPhrase("circle", "red", "large", "striped"), False, "a large striped red circle"),
        ("de", NounPhrase("circle", "red", "large", "striped"), False, "ein großer gestreifter roter Kreis"),
        ("de", NounPhrase("circle", "red", "large", "striped"), True, "einem großen gestreiften roten Kreis"),
        ("de", NounPhrase("diamond", "blue", "small", "dotted"), False, "eine kleine gepunktete blaue Raute"),
        (
            "de",
            NounPhrase("diamond", "blue", "small", "dotted"),
            True,
            "einer kleinen gepunkteten blauen Raute",
        ),
        ("de", NounPhrase("heart", "purple", "", "checkered"), False, "ein kariertes violettes Herz"),
        ("de", NounPhrase("heart", "orange", "", ""), True, "einem orangefarbenen Herz"),
        ("fr", NounPhrase("star", "green", "small", "striped"), False, "une petite étoile verte à rayures"),
        ("fr", NounPhrase("circle", "green", "small", "dotted"), False, "un petit cercle vert à pois"),
        ("fr", NounPhrase("cross", "brown", "large", ""), False, "une grande croix marron"),
        (
            "fr",
            NounPhrase("star", "orange", "large", "checkered"),
            True,
            "une grande étoile orange à carreaux",
        ),
        ("es", NounPhrase("star", "red", "small", "striped"), False, "una estrella roja pequeña a rayas"),
        (
            "es",
            NounPhrase("circle", "yellow", "large", "dotted"),
            False,
            "un círculo amarillo grande de lunares",
        ),
        ("es", NounPhrase("cross", "purple", "", ""), True, "una cruz morada"),
    ],
)
def test_agreement(language: str, phrase: NounPhrase, after: bool, expected: str) -> None:
    assert noun_phrase(language, phrase, after_relation=after) == expected


@pytest.mark.parametrize(
    ("language", "listed", "related"),
    [
        (
            "en",
            "a red star, an orange cross and a blue heart on a grey background",
            "a red star to the left of an orange cross",
        ),
        (
            "de",
            "ein roter Stern, ein orangefarbenes Kreuz und ein blaues Herz auf grauem Hintergrund",
            "ein roter Stern links von einem orangefarbenen Kreuz",
        ),
        (
            "fr",
            "une étoile rouge, une croix orange et un cœur bleu sur fond gris",
            "une étoile rouge à gauche d'une croix orange",
        ),
        (
            "es",
            "una estrella roja, una cruz naranja y un corazón azul sobre fondo gris",
            "una estrella roja a la izquierda de una cruz naranja",
        ),
    ],
)
def test_sentences(language: str, listed: str, related: str) -> None:
    star, cross, heart = NounPhrase("star", "red"), NounPhrase("cross", "orange"), NounPhrase("heart", "blue")
    caption = describe(language, [star, cross, heart], "grey")
    assert caption.text == listed
    assert [caption.text[a:b] for a, b in caption.spans] == [
        noun_phrase(language, phrase) for phrase in (star, cross, heart)
    ]
    caption = relate(language, star, "left of", cross)
    assert caption.text == related
    (a, b), (c, d) = caption.spans
    assert caption.text[a:b] == noun_phrase(language, star)
    assert caption.text[c:d] == noun_phrase(language, cross, after_relation=True)


def test_every_word_exists_in_every_language() -> None:
    sentences = set()
    for language in LANGUAGES:
        for shape in SHAPES:
            for colour in COLOURS:
                sentences.add(noun_phrase(language, NounPhrase(shape, colour, "small", "dotted")))
        for relation in RELATIONS:
            sentences.add(
                relate(language, NounPhrase("star", "red"), relation, NounPhrase("cross", "red")).text
            )
        for background in BACKGROUNDS:
            sentences.add(describe(language, [NounPhrase("star", "red")], background).text)
    assert len(sentences) == 4 * (64 + 5 + 3)


def test_grammar_checks() -> None:
    star = NounPhrase("star", "red")
    with pytest.raises(ValueError, match="language: expected one of en, de, fr, es, got 'it'"):
        noun_phrase("it", star)
    with pytest.raises(ValueError, match="relation: expected one of left of"):
        relate("en", star, "near", star)
    with pytest.raises(ValueError, match="phrases: expected at least one"):
        describe("en", [])


def test_samples_travel_to_other_processes(scenes: SampleSet) -> None:
    sample = scenes[5]
    copy = pickle.loads(pickle.dumps(sample))
    np.testing.assert_array_equal(_picture(copy), _picture(sample))
    first, second = sample.load_mask(), copy.load_mask()
    assert first is not None
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train": -1}, ValueError, "train: expected 0 or more"),
        ({"val": 1.5}, TypeError, "val: expected an int, got float"),
        ({"train": 0, "val": 0, "test": 0, "test_compositional": 0}, ValueError, "at least one scene"),
        ({"size": 8}, ValueError, "size: expected 16 to 1024"),
        ({"languages": ["en", "it"]}, ValueError, "languages: expected some of en, de, fr, es"),
        ({"languages": []}, ValueError, "languages: expected some of"),
        ({"max_objects": 5}, ValueError, "max_objects: expected 1 to 4"),
        ({"held_out": 9}, ValueError, "held_out: expected 0 to 8"),
        ({"held_out": 0}, ValueError, "held_out: expected at least 1"),
    ],
)
def test_argument_checks(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_scenes(**arguments)


def test_index_is_checked() -> None:
    with pytest.raises(ValueError, match="index: expected 0 or more"):
        make_scene(0, -1)


@pytest.mark.parametrize("held_out", [1, 8])
@pytest.mark.parametrize("max_objects", [1, 2, 4])
def test_all_options_give_scenes(held_out: int, max_objects: int) -> None:
    samples = read_scenes(
        train=60, val=1, test=1, test_compositional=30, size=32, held_out=held_out, max_objects=max_objects
    )
    assert max(len(sample.objects) for sample in samples) == max_objects
    pairs = held_out_pairs(held_out)
    for sample in samples.select("test_compositional"):
        assert {(t.attributes[2], t.label) for t in sample.objects} & pairs


def test_no_path_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _picture(read_scenes(train=1, val=0, test=0, test_compositional=0)[0])
    assert list(tmp_path.iterdir()) == []
