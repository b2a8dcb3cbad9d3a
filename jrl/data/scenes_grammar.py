"""Captions of generated scenes from a grammar in English, German, French and Spanish, with agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

LANGUAGES = ("en", "de", "fr", "es")
RELATIONS = ("left of", "right of", "above", "below", "inside")


@dataclass(frozen=True)
class NounPhrase:
    """What one phrase says of one object; an empty string leaves that attribute unsaid.

    Attributes:
        shape: "circle", "square", "triangle", "star", "diamond", "hexagon", "heart" or "cross".
        colour: "red", "orange", "yellow", "green", "blue", "purple", "pink" or "brown".
        size: "small", "large" or "".
        texture: "striped", "dotted", "checkered" or "".
    """

    shape: str
    colour: str = ""
    size: str = ""
    texture: str = ""


@dataclass(frozen=True)
class Caption:
    """A sentence and the character span of each of its noun phrases, in the order they were given."""

    text: str
    spans: tuple[tuple[int, int], ...]


# Grammatical gender and noun.
_NOUNS: dict[str, dict[str, tuple[str, str]]] = {
    "de": {
        "circle": ("m", "Kreis"),
        "square": ("n", "Quadrat"),
        "triangle": ("n", "Dreieck"),
        "star": ("m", "Stern"),
        "diamond": ("f", "Raute"),
        "hexagon": ("n", "Sechseck"),
        "heart": ("n", "Herz"),
        "cross": ("n", "Kreuz"),
    },
    "fr": {
        "circle": ("m", "cercle"),
        "square": ("m", "carré"),
        "triangle": ("m", "triangle"),
        "star": ("f", "étoile"),
        "diamond": ("m", "losange"),
        "hexagon": ("m", "hexagone"),
        "heart": ("m", "cœur"),
        "cross": ("f", "croix"),
    },
    "es": {
        "circle": ("m", "círculo"),
        "square": ("m", "cuadrado"),
        "triangle": ("m", "triángulo"),
        "star": ("f", "estrella"),
        "diamond": ("m", "rombo"),
        "hexagon": ("m", "hexágono"),
        "heart": ("m", "corazón"),
        "cross": ("f", "cruz"),
    },
}
_GERMAN = {
    "red": "rot",
    "orange": "orangefarben",
    "yellow": "gelb",
    "green": "grün",
    "blue": "blau",
    "purple": "violett",
    "pink": "rosafarben",
    "brown": "braun",
    "small": "klein",
    "large": "groß",
    "striped": "gestreift",
    "dotted": "gepunktet",
    "checkered": "kariert",
}
# Masculine and feminine; the noun's gender picks one.
_FRENCH = {
    "red": ("rouge", "rouge"),
    "orange": ("orange", "orange"),
    "yellow": ("jaune", "jaune"),
    "green": ("vert", "verte"),
    "blue": ("bleu", "bleue"),
    "purple": ("violet", "violette"),
    "pink": ("rose", "rose"),
    "brown": ("marron", "marron"),
    "small": ("petit", "petite"),
    "large": ("grand", "grande"),
    "striped": ("à rayures", "à rayures"),
    "dotted": ("à pois", "à pois"),
    "checkered": ("à carreaux", "à carreaux"),
}
_SPANISH = {
    "red": ("rojo", "roja"),
    "orange": ("naranja", "naranja"),
    "yellow": ("amarillo", "amarilla"),
    "green": ("verde", "verde"),
    "blue": ("azul", "azul"),
    "purple": ("morado", "morada"),
    "pink": ("rosa", "rosa"),
    "brown": ("marrón", "marrón"),
    "small": ("pequeño", "pequeña"),
    "large": ("grande", "grande"),
    "striped": ("a rayas", "a rayas"),
    "dotted": ("de lunares", "de lunares"),
    "checkered": ("a cuadros", "a cuadros"),
}
_RELATION_WORDS = {
    "en": ("to the left of ", "to the right of ", "above ", "below ", "inside "),
    "de": ("links von ", "rechts von ", "über ", "unter ", "in "),
    "fr": ("à gauche d'", "à droite d'", "au-dessus d'", "au-dessous d'", "à l'intérieur d'"),
    "es": ("a la izquierda de ", "a la derecha de ", "encima de ", "debajo de ", "dentro de "),
}
_AND = {"en": " and ", "de": " und ", "fr": " et ", "es": " y "}
_BACKGROUNDS = {
    "en": {
        "white": " on a white background",
        "grey": " on a grey background",
        "black": " on a black background",
    },
    "de": {
        "white": " auf weißem Hintergrund",
        "grey": " auf grauem Hintergrund",
        "black": " auf schwarzem Hintergrund",
    },
    "fr": {"white": " sur fond blanc", "grey": " sur fond gris", "black": " sur fond noir"},
    "es": {"white": " sobre fondo blanco", "grey": " sobre fondo gris", "black": " sobre fondo negro"},
}


def _english(phrase: NounPhrase, dative: bool) -> str:
    words = [w for w in (phrase.size, phrase.texture, phrase.colour, phrase.shape) if w]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _german(phrase: NounPhrase, dative: bool) -> str:
    gender, noun = _NOUNS["de"][phrase.shape]
    if dative:
        article, ending = ("einer" if gender == "f" else "einem"), "en"
    else:
        article, ending = ("eine" if gender == "f" else "ein"), {"m": "er", "f": "e", "n": "es"}[gender]
    adjectives = [_GERMAN[w] + ending for w in (phrase.size, phrase.texture, phrase.colour) if w]
    return " ".join([article, *adjectives, noun])


def _french(phrase: NounPhrase, dative: bool) -> str:
    gender, noun = _NOUNS["fr"][phrase.shape]
    form = 1 if gender == "f" else 0
    before = [_FRENCH[phrase.size][form]] if phrase.size else []
    after = [_FRENCH[w][form] for w in (phrase.colour, phrase.texture) if w]
    return " ".join([("un", "une")[form], *before, noun, *after])


def _spanish(phrase: NounPhrase, dative: bool) -> str:
    gender, noun = _NOUNS["es"][phrase.shape]
    form = 1 if gender == "f" else 0
    after = [_SPANISH[w][form] for w in (phrase.colour, phrase.size, phrase.texture) if w]
    return " ".join([("un", "una")[form], noun, *after])


_PHRASES: dict[str, Callable[[NounPhrase, bool], str]] = {
    "en": _english,
    "de": _german,
    "fr": _french,
    "es": _spanish,
}


def noun_phrase(language: str, phrase: NounPhrase, *, after_relation: bool = False) -> str:
    """An indefinite noun phrase, such as "a small striped red circle".

    Args:
        language: "en", "de", "fr" or "es".
        phrase: what to say.
        after_relation: the phrase follows a relation, which asks for the dative in German.

    Returns:
        The phrase, article included.

    Raises:
        ValueError: another language.
    """
    _check_language(language)
    return _PHRASES[language](phrase, after_relation)


def describe(language: str, phrases: Sequence[NounPhrase], background: str = "") -> Caption:
    """A list of all objects: "a red circle, a blue square and a star on a white background".

    Args:
        language: "en", "de", "fr" or "es".
        phrases: one or more.
        background: "white", "grey", "black", or "" to leave it unsaid.

    Returns:
        The caption and the span of each phrase.

    Raises:
        ValueError: no phrase, or another language.
    """
    _check_language(language)
    if not phrases:
        raise ValueError("phrases: expected at least one, got none")
    text, spans = "", []
    for i, phrase in enumerate(phrases):
        if i:
            text += _AND[language] if i == len(phrases) - 1 else ", "
        words = noun_phrase(language, phrase)
        spans.append((len(text), len(text) + len(words)))
        text += words
    if background:
        text += _BACKGROUNDS[language][background]
    return Caption(text, tuple(spans))


def relate(language: str, subject: NounPhrase, relation: str, ground: NounPhrase) -> Caption:
    """Two objects and how they lie: "a red circle to the left of a blue square".

    Args:
        language: "en", "de", "fr" or "es".
        subject: the object of which something is said.
        relation: "left of", "right of", "above", "below" or "inside".
        ground: the object to which it is related.

    Returns:
        The caption and the spans of both phrases.

    Raises:
        ValueError: another language or relation.
    """
    _check_language(language)
    if relation not in RELATIONS:
        raise ValueError(f"relation: expected one of {', '.join(RELATIONS)}, got {relation!r}")
    first = noun_phrase(language, subject)
    second = noun_phrase(language, ground, after_relation=True)
    start = f"{first} {_RELATION_WORDS[language][RELATIONS.index(relation)]}"
    return Caption(start + second, ((0, len(first)), (len(start), len(start) + len(second))))


def _check_language(language: str) -> None:
    if language not in LANGUAGES:
        raise ValueError(f"language: expected one of {', '.join(LANGUAGES)}, got {language!r}")
