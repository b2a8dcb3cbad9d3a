"""Nouns of captions and the prompts made of them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from jrl.data import nouns
from jrl.data.nouns import NounTagger, PromptOptions, Prompts


@pytest.fixture(scope="module")
def english() -> NounTagger:
    pytest.importorskip("HanTa", reason="the tagger is part of jrl[train]")
    return NounTagger()


def test_english(english: NounTagger) -> None:
    caption = "Two dogs are running on the green grass, near the old wooden house."
    assert english.nouns(caption) == ["dogs", "grass", "house"]
    assert english.nouns(caption, verbs=True) == ["dogs", "running", "grass", "house"]
    assert english.noun_phrases(caption) == ["dogs", "green grass", "old wooden house"]
    scene = "a small striped red circle, a blue square and a pink heart on a white background"
    assert english.noun_phrases(scene) == [
        "small striped red circle",
        "blue square",
        "pink heart",
        "white background",
    ]
    assert english.nouns("a dog and a dog") == ["dog", "dog"]
    for nothing in ("", "  ", "...!"):
        assert english.nouns(nothing) == english.noun_phrases(nothing) == []


@pytest.mark.parametrize(
    ("language", "caption", "phrases"),
    [
        ("de", "ein kleiner roter Kreis und ein blaues Quadrat", ["kleiner roter Kreis", "blaues Quadrat"]),
        ("nl", "een kleine rode cirkel en een blauw vierkant", ["kleine rode cirkel", "blauw vierkant"]),
    ],
)
def test_other_languages(language: str, caption: str, phrases: list[str]) -> None:
    pytest.importorskip("HanTa", reason="the tagger is part of jrl[train]")
    assert NounTagger(language).noun_phrases(caption) == phrases


def test_prompts_fill_up_with_the_caption_and_follow_the_generator(english: NounTagger) -> None:
    caption = "a red circle and a blue square"
    prompts = Prompts(english, 3, "noun_phrase", templates=("a {}", "the {}!"))
    drawn = prompts.draw(caption, np.random.default_rng(0))
    assert drawn == prompts.draw(caption, np.random.default_rng(0))
    assert len(drawn) == 3 and drawn[2] == caption
    assert {text.strip("!").split(" ", 1)[1] for text in drawn[:2]} == {"red circle", "blue square"}
    generator = np.random.default_rng(1)
    several = {tuple(prompts.draw(caption, generator)) for _ in range(50)}
    assert len(several) == 8  # two orders, two templates each
    one = Prompts(english, 1, templates=("{}",))
    assert {one.draw(caption, generator)[0] for _ in range(30)} == {"circle", "square"}
    assert one.draw("!", generator) == ["!"]


def test_options_build_prompts_whose_memory_of_captions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("HanTa", reason="the tagger is part of jrl[train]")
    options = PromptOptions("de", count=1, kind="noun_phrase", templates=("<{}>",))
    prompts = options.build()
    monkeypatch.setattr(nouns, "_KEPT", 1)
    generator = np.random.default_rng(0)
    for _ in range(2):
        assert prompts.draw("ein roter Kreis", generator) == ["<roter Kreis>"]
        assert prompts.draw("ein blauer Kreis", generator) == ["<blauer Kreis>"]
    assert list(prompts._found) == ["ein roter Kreis"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count"),
        ({"kind": "verb"}, "kind"),
        ({"kind": "noun_phrase", "verbs": True}, "verbs"),
        ({"templates": ()}, "templates"),
        ({"templates": ("a photo",)}, "templates"),
    ],
)
def test_bad_prompts(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Prompts(object.__new__(NounTagger), **options)


def test_bad_taggers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="language: expected one of en, de, nl, got 'xx'"):
        NounTagger("xx")
    for name in ("HanTa", "HanTa.HanoverTagger"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="HanTa"):
        NounTagger()
