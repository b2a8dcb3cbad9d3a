"""Nouns and noun phrases of captions, and the prompts made of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a picture that shows a {}.",
    "a close view of a {}.",
    "a {} seen from afar.",
    "a small {}.",
    "a large {}.",
    "one {}.",
    "many {}.",
    "a drawing of a {}.",
    "a dark photo of a {}.",
    "a bright photo of a {}.",
)
KINDS = ("noun", "noun_phrase")

# Captions whose nouns are kept: a dataset of millions would fill the memory, and gains little from them.
_KEPT = 200_000


@dataclass(frozen=True)
class _Language:
    model: str
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    modifiers: tuple[str, ...]


# Beginnings of the tags of each model's tag set: BNC C5, STTS and CGN.
_LANGUAGES = {
    "en": _Language("morphmodel_en.pgz", ("NN", "NP"), ("VV",), ("AJ", "VVN", "VVG")),
    "de": _Language("morphmodel_ger.pgz", ("NN", "NE"), ("VV",), ("ADJ",)),
    "nl": _Language("morphmodel_dutch.pgz", ("N(", "SPEC(deeleigen"), ("WW(",), ("ADJ",)),
}
LANGUAGES = tuple(_LANGUAGES)
_TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


class NounTagger:
    """Finds the nouns of a caption with the Hanover Tagger, whose models come inside its package.

    Args:
        language: "en", "de" or "nl".

    Raises:
        ValueError: another language.
        ModuleNotFoundError: the package HanTa is not installed.
    """

    def __init__(self, language: str = "en") -> None:
        if language not in _LANGUAGES:
            raise ValueError(f"language: expected one of {', '.join(LANGUAGES)}, got {language!r}")
        try:
            from HanTa.HanoverTagger import HanoverTagger
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("nouns need the package HanTa: pip install 'jrl[train]'") from error
        self.language = language
        self._tags = _LANGUAGES[language]
        self._tagger: Any = HanoverTagger(self._tags.model)

    def nouns(self, caption: str, *, verbs: bool = False) -> list[str]:
        """The nouns in their order, as they are written; one that occurs twice is given twice.

        Args:
            caption: the text.
            verbs: the full verbs too, as GroupViT's code takes them.
        """
        wanted = self._tags.nouns + (self._tags.verbs if verbs else ())
        return [word for word, tag in self._tagged(caption) if tag.startswith(wanted)]

    def noun_phrases(self, caption: str) -> list[str]:
        """The longest runs of adjectives and participles that end in nouns, without articles.

        Args:
            caption: the text.
        """
        phrases: list[str] = []
        run: list[str] = []
        last_noun = 0
        for word, tag in [*self._tagged(caption), ("", "")]:
            is_noun = tag.startswith(self._tags.nouns)
            if is_noun or (tag.startswith(self._tags.modifiers) and not last_noun):
                run.append(word)
                last_noun = len(run) if is_noun else last_noun
                continue
            if last_noun:
                phrases.append(" ".join(run[:last_noun]))
            starts = tag.startswith(self._tags.modifiers)
            run, last_noun = ([word] if starts else []), 0
        return phrases

    def _tagged(self, caption: str) -> list[tuple[str, str]]:
        tokens = _TOKEN.findall(caption)
        if not tokens:
            return []
        # a mark ends a phrase whatever tag it is given
        return [(word, tag if word[0].isalnum() else "") for word, _, tag in self._tagger.tag_sent(tokens)]


class Prompts:
    """K prompts of a caption: nouns of it in templates, filled up with the caption itself.

    Xu et al. 2022 (GroupViT): min(K, number) of the nouns are drawn without replacement, each is put into a
    template drawn at random, and copies of the caption fill the rest.

    Args:
        tagger: finds the nouns.
        count: K.
        kind: "noun" or "noun_phrase".
        verbs: count full verbs as nouns ("noun" only), as GroupViT's code does.
        templates: texts with "{}" where the noun goes.

    Raises:
        ValueError: a value out of range, no template, or one without "{}".
    """

    def __init__(
        self,
        tagger: NounTagger,
        count: int = 3,
        kind: str = "noun",
        verbs: bool = False,
        templates: Sequence[str] = TEMPLATES,
    ) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1, got {count}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if verbs and kind != "noun":
            raise ValueError(f"verbs: has a meaning only for the kind 'noun', got {kind!r}")
        if not templates:
            raise ValueError("templates: expected at least one")
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"templates: expected '{{}}' where the noun goes, got {template!r}")
        self.tagger, self.count, self.kind, self.verbs = tagger, count, kind, verbs
        self.templates = tuple(templates)
        self._found: dict[str, list[str]] = {}

    def draw(self, caption: str, generator: np.random.Generator) -> list[str]:
        """K prompts; the same generator state gives the same ones.

        Args:
            caption: the text.
            generator: of the draws.
        """
        found = self._words(caption)
        chosen = generator.permutation(len(found))[: self.count]
        templates = generator.integers(len(self.templates), size=len(chosen))
        prompts = [
            self.templates[template].replace("{}", found[word])
            for word, template in zip(chosen.tolist(), templates.tolist(), strict=True)
        ]
        return prompts + [caption] * (self.count - len(prompts))

    def _words(self, caption: str) -> list[str]:
        found = self._found.get(caption)
        if found is None:
            phrases = self.kind == "noun_phrase"
            found = (
                self.tagger.noun_phrases(caption) if phrases else self.tagger.nouns(caption, verbs=self.verbs)
            )
            if len(self._found) < _KEPT:
                self._found[caption] = found
        return found


@dataclass(frozen=True)
class PromptOptions:
    """What `Prompts` are made with, in plain values; the tagger is loaded when they are built.

    Args:
        language: of the captions, "en", "de" or "nl".
        count, kind, verbs, templates: as in `Prompts`.
    """

    language: str = "en"
    count: int = 3
    kind: str = "noun"
    verbs: bool = False
    templates: Sequence[str] = TEMPLATES

    def build(self) -> Prompts:
        """The prompts.

        Raises:
            ValueError: a value out of range.
            ModuleNotFoundError: the package HanTa is not installed.
        """
        return Prompts(NounTagger(self.language), self.count, self.kind, self.verbs, self.templates)
