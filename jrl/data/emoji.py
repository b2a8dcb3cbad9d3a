"""Colour emoji as an image-text dataset: pictures from an installed font, names written by people."""

from __future__ import annotations

import os
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jrl.data.emoji_concepts import Concept, fill_defaults, parse_emoji, split_tones
from jrl.data.emoji_font import can_shape, draw_emoji, find_emoji_font
from jrl.data.emoji_split import HELD_OUT, PARTS, SplitSizes, split_emoji
from jrl.data.sample import Sample, SampleSet, SkipReport

CLDR_FOLDER = Path("/usr/share/unicode/cldr/common")
CLDR_PACKAGE = "unicode-cldr-core"
_REGIONAL = range(0x1F1E6, 0x1F200)


@dataclass(frozen=True)
class PixelRow:
    """A picture kept as an array [H, W, 3] of uint8; calling it gives a Pillow image."""

    pixels: np.ndarray

    def __call__(self) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels))


def emoji_languages() -> tuple[str, ...]:
    """The languages in which the `emoji` package names emoji, English first."""
    import emoji

    return tuple(sorted(emoji.LANGUAGES, key=lambda code: (code != "en", code)))


def read_emoji(
    *,
    font: str | os.PathLike[str] | None = None,
    size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    languages: Sequence[str] | None = None,
    keyword_languages: Sequence[str] = ("en",),
    cldr: str | os.PathLike[str] | None = None,
    seed: int = 0,
    sizes: SplitSizes | Mapping[str, int] | None = None,
) -> SampleSet:
    """Every colour emoji that the font draws as one picture of its own, with its names, keywords and split.

    Splits: "train", "val_compositional", "val_unseen", "test_compositional", "test_unseen" (``split_emoji``).
    Captions are the names in the languages asked for, in that order; a flag, which the `emoji` package
    names by its country alone in English, is called "flag: <country>" as in CLDR. Tags are the CLDR keywords
    and the English by-names. ``metadata`` holds "emoji", "base", "attributes", and "aliases": the names of
    other emoji that are drawn with exactly the same pixels and therefore left out.

    Args:
        font: font file or folder; by default the installed Noto Color Emoji.
        size: side of the pictures in pixels.
        cache: folder in which drawn pictures are kept for the next call.
        languages: codes of caption languages; all 14 of the package, English first, by default.
        keyword_languages: codes of the CLDR keyword languages.
        cldr: the CLDR ``common`` folder; by default Debian's, and no keywords when that is not installed.
        seed: seed of the split.
        sizes: pictures in each part of the split; a mapping names the parts that differ from the defaults.

    Returns:
        The samples, with the account of every emoji left out.

    Raises:
        FileNotFoundError: no font, or ``cldr`` given without annotations in it.
        ValueError: an unknown language, a bad size, a file that is no colour-emoji font, or a font with too
            few emoji for the split.
    """
    import emoji

    known = emoji_languages()
    chosen = known if languages is None else tuple(languages)
    if not chosen or any(code not in known for code in chosen):
        raise ValueError(f"languages: expected some of {', '.join(known)}, got {list(chosen)}")
    # The package reads every language but English and Spanish from its files only when told to.
    emoji.config.load_language(list(chosen))
    if isinstance(sizes, Mapping):
        if not set(sizes) <= set(PARTS):
            raise ValueError(f"sizes: expected some of {', '.join(PARTS)}, got {', '.join(map(str, sizes))}")
        sizes = SplitSizes(**sizes)
    font_path = find_emoji_font(font)
    data = emoji.EMOJI_DATA
    qualified = [s for s, entry in data.items() if entry["status"] == emoji.STATUS["fully_qualified"]]
    # Simple and early emoji first, so that of several drawn alike the best known one is kept.
    qualified.sort(key=lambda s: (len(s), data[s]["E"], data[s]["en"]))
    pictures = draw_emoji(qualified, font=font_path, size=size, cache=cache)

    skips = SkipReport()
    for sequence, reason in pictures.skipped.items():
        skips.add(reason, f"{_words(data[sequence]['en'])} ({_code_points(sequence)})")
    if not can_shape():
        skips.note(
            "this Pillow has no libraqm: flags, skin tones and joined emoji cannot be drawn", str(font_path)
        )

    first: dict[str, str] = {}
    rows: dict[str, int] = {}
    aliases: dict[str, list[str]] = {}
    for row, (sequence, digest) in enumerate(zip(pictures.sequences, pictures.digests, strict=True)):
        keeper = first.setdefault(digest, sequence)
        if keeper == sequence:
            rows[sequence] = row
            continue
        aliases.setdefault(keeper, []).append(sequence)
        skips.add("drawn exactly like another emoji", f"{_name(sequence)} is drawn like {_name(keeper)}")

    concepts = fill_defaults({s: parse_emoji(s, _words(data[s]["en"])) for s in rows})
    parts = split_emoji(
        concepts, pictures.thumbnails[list(rows.values())], seed=seed, sizes=sizes, never_test=list(aliases)
    )
    keywords = _Keywords(cldr, keyword_languages)
    for language in keywords.missing:
        skips.note(
            f"no CLDR keywords in {language!r}: the Debian package {CLDR_PACKAGE} has them",
            str(keywords.folder),
        )

    samples = []
    for sequence, row in rows.items():
        if parts[sequence] == HELD_OUT:
            skips.add(
                "variation of a concept held out for a part that is never seen in training", _name(sequence)
            )
            continue
        samples.append(
            _sample(
                sequence,
                PixelRow(pictures.pixels[row]),
                chosen,
                concepts[sequence],
                parts[sequence],
                keywords(sequence),
                [_name(s) for s in aliases.get(sequence, [])],
            )
        )
    skips.raise_if_empty(len(samples), font_path)
    samples.sort(key=lambda sample: sample.key)
    return SampleSet(samples, name="emoji", skips=skips)


def _sample(
    sequence: str,
    image: PixelRow,
    languages: Sequence[str],
    concept: Concept,
    part: str,
    keywords: Sequence[str],
    aliases: list[str],
) -> Sample:
    import emoji

    entry = emoji.EMOJI_DATA[sequence]
    named = [code for code in languages if code in entry]
    captions = [_name(sequence, code) for code in named]
    by_names = [_words(alias) for alias in entry.get("alias", [])]
    tags = [tag for tag in dict.fromkeys([*keywords, *by_names]) if tag not in captions]
    return Sample(
        key=_code_points(sequence),
        image=image,
        captions=captions,
        languages=list(named),
        tags=tags,
        split=part,
        metadata={
            "emoji": sequence,
            "base": concept.base,
            "attributes": dict(concept.attributes),
            "aliases": aliases,
        },
    )


def _code_points(sequence: str) -> str:
    return "-".join(f"{ord(character):x}" for character in sequence)


def _words(name: str) -> str:
    words = name.strip(":").replace("_", " ")
    return unicodedata.normalize("NFC", " ".join(words.split()))


def _name(sequence: str, language: str = "en") -> str:
    import emoji

    name = _words(emoji.EMOJI_DATA[sequence][language])
    is_flag = ord(sequence[0]) in _REGIONAL or "\U000e007f" in sequence
    return f"flag: {name}" if is_flag and language == "en" else name


class _Keywords:
    """CLDR keywords by emoji; an emoji with skin tones falls back on the keywords of the one without."""

    def __init__(self, folder: str | os.PathLike[str] | None, languages: Sequence[str]) -> None:
        self.folder = CLDR_FOLDER if folder is None else Path(folder).expanduser()
        self.missing: list[str] = []
        self._keywords: dict[str, list[str]] = {}
        for language in languages:
            files = [self.folder / kind / f"{language}.xml" for kind in ("annotations", "annotationsDerived")]
            present = [file for file in files if file.is_file()]
            if folder is not None and not present:
                raise FileNotFoundError(
                    f"cldr: expected annotations/{language}.xml in {self.folder}, found none"
                )
            if not present:
                self.missing.append(language)
            for file in present:
                self._read(file)

    def _read(self, file: Path) -> None:
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{file}: expected a CLDR annotations file, got broken XML ({error})") from error
        for annotation in root.iter("annotation"):
            if annotation.get("type") == "tts" or not annotation.text:
                continue
            words = [" ".join(word.split()) for word in annotation.text.split("|")]
            kept = self._keywords.setdefault(annotation.get("cp", ""), [])
            kept.extend(word for word in words if word and word not in kept)

    def __call__(self, sequence: str) -> list[str]:
        # CLDR writes its sequences without presentation selectors.
        plain = sequence.replace("\ufe0f", "")
        return self._keywords.get(plain) or self._keywords.get(split_tones(sequence)[0], [])
