"""Base concept and attributes of an emoji, read from its code points and its English name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SKIN_TONES = {
    "\U0001f3fb": "light",
    "\U0001f3fc": "medium-light",
    "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}
_JOINER = "\u200d"
_PRESENTATION = "\ufe0f"
_FACING_RIGHT = "\u27a1"
_KEYCAP = "\u20e3"
_SIGNS = {"\u2640": "woman", "\u2642": "man"}
_ADULTS = {"\U0001f468": "man", "\U0001f469": "woman", "\U0001f9d1": "person"}
_CHILDREN = {"\U0001f466": "boy", "\U0001f467": "girl", "\U0001f9d2": "child"}
_HAIR = {"\U0001f9b0": "red", "\U0001f9b1": "curly", "\U0001f9b2": "bald", "\U0001f9b3": "white"}
_LINKS = {
    "\u2764": "couple with heart",
    "\u2764\u200d\U0001f48b": "kiss",
    "\U0001f91d": "holding hands",
}
_HANDSHAKES = ("\U0001f91d", "\U0001faf1\u200d\U0001faf2")
_FAMILY = "\U0001f46a"
_RED_HEART = "\u2764"
_CHRISTMAS_TREE = "\U0001f384"

# Unicode gave these genders code points of their own instead of a sequence.
_GENDERED: dict[str, tuple[str, str]] = {
    "\U0001f385": ("claus", "man"),
    "\U0001f936": ("claus", "woman"),
    "\U0001f934": ("royalty", "man"),
    "\U0001f478": ("royalty", "woman"),
    "\U0001fac5": ("royalty", "person"),
    "\U0001f466": ("child", "man"),
    "\U0001f467": ("child", "woman"),
    "\U0001f9d2": ("child", "person"),
    "\U0001f474": ("older adult", "man"),
    "\U0001f475": ("older adult", "woman"),
    "\U0001f9d3": ("older adult", "person"),
    "\U0001f57a": ("dancing", "man"),
    "\U0001f483": ("dancing", "woman"),
    "\U0001f930": ("pregnant", "woman"),
    "\U0001fac3": ("pregnant", "man"),
    "\U0001fac4": ("pregnant", "person"),
    "\U0001f6b9": ("room sign", "man"),
    "\U0001f6ba": ("room sign", "woman"),
}
_PAIRS: dict[str, tuple[str, str, str]] = {
    "\U0001f46b": ("holding hands", "woman", "man"),
    "\U0001f46c": ("holding hands", "man", "man"),
    "\U0001f46d": ("holding hands", "woman", "woman"),
    "\U0001f48f": ("kiss", "person", "person"),
    "\U0001f491": ("couple with heart", "person", "person"),
}

_COLOURS = "black|blue|brown|green|grey|light blue|orange|pink|purple|red|white|yellow"
_ASPECTS = {
    "colour": _COLOURS,
    "size": "large|medium-small|medium|small",
    "direction": (
        "up-down|left-right|up-left|up-right|down-left|down-right|leftwards|rightwards|upwards|downwards"
        "|left-facing|right-facing|clockwise|counterclockwise|up|down|left|right"
    ),
}
# Names of plain symbols that differ from one another only in a colour, a size or a direction.
_SYMBOL = re.compile(
    r"(heart|circle|square|book|apple|diamond|arrow|arrow curving|fist|hand|pushing hand|thumb sign|button"
    r"|question mark|exclamation mark|triangle pointed|magnifying glass tilted|thumbs|finger pointing"
    r"|backhand index pointing|index pointing|vertical arrows|arrows button|speech bubble|anger bubble)"
)
_TONE_WORDS = re.compile(r":? (?:(?:medium-)?light|medium|(?:medium-)?dark) skin tone")
_FAMILIES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(.+) o.clock|(.+)-thirty"), "clock face"),
    (re.compile(r"(?:full|new|last quarter|first quarter|crescent) moon(?: face)?"), "moon"),
    (re.compile(r"(?:waxing|waning) (?:crescent|gibbous) moon"), "moon"),
    (re.compile(r"input .+"), "input sign"),
    (re.compile(r"globe showing .+"), "globe showing"),
    (re.compile(r"speaker (?:low|medium|high) volume"), "speaker"),
    (re.compile(r"(?:closed|open) mailbox with (?:lowered|raised) flag"), "mailbox"),
    (re.compile(r"(?:1st|2nd|3rd) place medal"), "place medal"),
    (re.compile(r"hourglass (?:not )?done"), "hourglass"),
    (re.compile(r"(?:A|B|AB|O) button \(blood type\)"), "blood type"),
)


@dataclass(frozen=True)
class Concept:
    """What an emoji shows: the base concept and its attributes as (name, value) pairs in a fixed order."""

    base: str
    attributes: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The whole combination, equal for two emoji that mean the same."""
        return self.base, self.attributes


def split_tones(sequence: str) -> tuple[str, tuple[str, ...]]:
    """Take the skin-tone modifiers and presentation selectors out of an emoji sequence.

    Args:
        sequence: the emoji, one or several code points.

    Returns:
        The sequence without them, and the tones in order ("light" to "dark").
    """
    tones = tuple(SKIN_TONES[c] for c in sequence if c in SKIN_TONES)
    plain = "".join(c for c in sequence if c not in SKIN_TONES and c != _PRESENTATION)
    return plain, tones


def parse_emoji(sequence: str, name: str) -> Concept:
    """Base concept and attributes of one emoji.

    Skin tones, gender signs, hair, facing, couples and families are read from the code points; plain symbols
    that come in several colours, sizes or directions ("red heart", "down arrow") from the English name.

    Args:
        sequence: the emoji, one or several code points.
        name: its English name in words, such as "woman running: dark skin tone".

    Returns:
        The concept; an attribute that its base never varies in is absent.
    """
    plain, tones = split_tones(sequence)
    parts = plain.split(_JOINER)
    attributes: dict[str, str] = {}
    if _FACING_RIGHT in parts[1:]:
        attributes["facing"] = "right"
        parts = [parts[0], *(p for p in parts[1:] if p != _FACING_RIGHT)]
    for sign, gender in _SIGNS.items():
        if sign in parts[1:]:
            attributes["gender"] = gender
            parts = [parts[0], *(p for p in parts[1:] if p != sign)]

    base, found = _parse_people(parts)
    attributes.update(found)
    if tones:
        attributes["skin tone"] = tones[0]
        if "second gender" in attributes or base == "handshake":
            attributes["second skin tone"] = tones[-1]
    if base == parts[0] and len(parts) == 1:
        base, found = _parse_symbol(base, _TONE_WORDS.sub("", name))
        attributes.update(found)
    return Concept(base, tuple(sorted(attributes.items())))


def _parse_people(parts: Sequence[str]) -> tuple[str, dict[str, str]]:
    adults = [_ADULTS[p] for p in parts if p in _ADULTS]
    children = [_CHILDREN[p] for p in parts if p in _CHILDREN]
    joined = _JOINER.join(parts)
    if joined == _FAMILY or (children and len(parts) > 1 and len(adults) + len(children) == len(parts)):
        return "family", {"adults": " ".join(adults) or "any", "children": " ".join(children) or "any"}
    if len(adults) == 2:
        link = _JOINER.join(p for p in parts if p not in _ADULTS)
        return _LINKS.get(link, f"pair {link}"), {"gender": adults[0], "second gender": adults[1]}
    if joined in _PAIRS:
        base, first, second = _PAIRS[joined]
        return base, {"gender": first, "second gender": second}
    if joined in _HANDSHAKES:
        return "handshake", {}
    if len(adults) == 1 and parts[0] in _ADULTS:
        rest = _JOINER.join(parts[1:])
        found = {"gender": adults[0]}
        if not rest:
            return "person", found
        if rest in _HAIR:
            return "person", {**found, "hair": _HAIR[rest]}
        return ("claus" if rest == _CHRISTMAS_TREE else f"adult {rest}"), found
    if joined in _GENDERED:
        base, gender = _GENDERED[joined]
        return base, {"gender": gender}
    # A black cat is a cat, a lime is drawn as a green lemon: one concept in two states.
    if len(parts) > 1:
        base = "heart" if parts[0] == _RED_HEART else parts[0]
        return base, {"joined with": _JOINER.join(parts[1:])}
    return joined, {}


def _parse_symbol(base: str, name: str) -> tuple[str, dict[str, str]]:
    if base.endswith(_KEYCAP):
        return "keycap", {"label": base[0]}
    for pattern, family in _FAMILIES:
        if pattern.fullmatch(name):
            return family, {"state": name}
    found: dict[str, str] = {}
    rest = f" {name} "
    for aspect, words in _ASPECTS.items():
        values = [m.group(1) for m in re.finditer(rf"(?<= )({words})(?= )", rest)]
        if values:
            found[aspect] = " ".join(values)
            rest = re.sub(rf" (?:{words})(?= )", "", rest)
    rest = rest.strip()
    if found and _SYMBOL.fullmatch(rest):
        return rest, found
    return base, {}


def fill_defaults(concepts: Mapping[str, Concept]) -> dict[str, Concept]:
    """Name the value of every attribute in which a base concept varies.

    A yellow hand beside five toned ones gets the skin tone "default", so that "no modifier" counts as a value
    that training must have shown, like any other.

    Args:
        concepts: concept of each emoji sequence.

    Returns:
        The same mapping, every concept with all the attributes its base takes anywhere.
    """
    names: dict[str, set[str]] = {}
    for concept in concepts.values():
        names.setdefault(concept.base, set()).update(name for name, _ in concept.attributes)
    filled = {}
    for sequence, concept in concepts.items():
        values = dict(concept.attributes)
        for attribute in names[concept.base]:
            values.setdefault(attribute, "person" if attribute.endswith("gender") else "default")
        filled[sequence] = Concept(concept.base, tuple(sorted(values.items())))
    return filled
