from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jrl.data import emoji_font
from jrl.data.emoji import PixelRow, emoji_languages, read_emoji
from jrl.data.emoji_concepts import Concept, fill_defaults, parse_emoji, split_tones
from jrl.data.emoji_font import EmojiPainter, can_shape, draw_emoji, find_emoji_font
from jrl.data.emoji_split import NEAR_DUPLICATE, PARTS
from jrl.data.sample import Sample, SampleSet

DARK, LIGHT = "\U0001f3ff", "\U0001f3fb"
JOINER, FEMALE, RIGHT = "\u200d", "\u2640\ufe0f", "\u27a1\ufe0f"
RUNNER, WOMAN, MAN, ADULT = "\U0001f3c3", "\U0001f469", "\U0001f468", "\U0001f9d1"
HEART, KISS, HANDS = "\u2764\ufe0f", "\U0001f48b", "\U0001f91d"
THUMB, GHOST = "\U0001f44d", "\U0001f47b"


@pytest.fixture(scope="module")
def font() -> Path:
    try:
        return find_emoji_font()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emoji-cache")


@pytest.fixture(scope="module")
def dataset(font: Path, cache: Path) -> SampleSet:
    if not can_shape():
        pytest.skip("this Pillow has no libraqm, without which most emoji cannot be drawn")
    return read_emoji(size=32, cache=cache)


@pytest.mark.parametrize(
    ("sequence", "name", "base", "attributes"),
    [
        (
            RUNNER + DARK + JOINER + FEMALE + JOINER + RIGHT,
            "woman running facing right: dark skin tone",
            RUNNER,
            {"facing": "right", "gender": "woman", "skin tone": "dark"},
        ),
        (
            WOMAN + LIGHT + JOINER + "\u2695\ufe0f",
            "woman health worker",
            "adult \u2695",
            {"gender": "woman", "skin tone": "light"},
        ),
        (MAN + JOINER + "\U0001f9b3", "man white hair", "person", {"gender": "man", "hair": "white"}),
        (WOMAN, "woman", "person", {"gender": "woman"}),
        ("\U0001f467", "girl", "child", {"gender": "woman"}),
        (ADULT + JOINER + "\U0001f384", "Mx Claus", "claus", {"gender": "person"}),
        ("\U0001f385" + DARK, "Santa Claus", "claus", {"gender": "man", "skin tone": "dark"}),
        (
            WOMAN + LIGHT + JOINER + HEART + JOINER + KISS + JOINER + MAN + DARK,
            "kiss: woman, man",
            "kiss",
            {"gender": "woman", "second gender": "man", "skin tone": "light", "second skin tone": "dark"},
        ),
        (
            WOMAN + JOINER + HEART + JOINER + WOMAN,
            "couple with heart",
            "couple with heart",
            {"gender": "woman", "second gender": "woman"},
        ),
        (
            "\U0001f46b" + DARK,
            "woman and man holding hands",
            "holding hands",
            {"gender": "woman", "second gender": "man", "skin tone": "dark", "second skin tone": "dark"},
        ),
        (
            ADULT + LIGHT + JOINER + HANDS + JOINER + ADULT + DARK,
            "people holding hands",
            "holding hands",
            {"gender": "person", "second gender": "person", "skin tone": "light", "second skin tone": "dark"},
        ),
        (
            MAN + JOINER + WOMAN + JOINER + "\U0001f467" + JOINER + "\U0001f466",
            "family",
            "family",
            {"adults": "man woman", "children": "girl boy"},
        ),
        (
            "\U0001faf1" + LIGHT + JOINER + "\U0001faf2" + DARK,
            "handshake",
            "handshake",
            {"skin tone": "light", "second skin tone": "dark"},
        ),
        ("\U0001f499", "blue heart", "heart", {"colour": "blue"}),
        (
            "\U0001f447" + LIGHT,
            "backhand index pointing down light skin tone",
            "backhand index pointing",
            {"direction": "down", "skin tone": "light"},
        ),
        ("\u2197\ufe0f", "up-right arrow", "arrow", {"direction": "up-right"}),
        ("\U0001f553", "four o’clock", "clock face", {"state": "four o’clock"}),
        ("7\ufe0f\u20e3", "keycap 7", "keycap", {"label": "7"}),
        ("\U0001f1eb\U0001f1f7", "France", "\U0001f1eb\U0001f1f7", {}),
        ("\U0001f9ca", "ice", "\U0001f9ca", {}),
        ("\U0001f494", "broken heart", "\U0001f494", {}),
        (HEART + JOINER + "\U0001f525", "heart on fire", "heart", {"joined with": "\U0001f525"}),
        ("\U0001f408" + JOINER + "\u2b1b", "black cat", "\U0001f408", {"joined with": "\u2b1b"}),
    ],
)
def test_parse(sequence: str, name: str, base: str, attributes: dict[str, str]) -> None:
    assert parse_emoji(sequence, name) == Concept(base, tuple(sorted(attributes.items())))


def test_split_tones() -> None:
    assert split_tones(THUMB + DARK) == (THUMB, ("dark",))
    assert split_tones(HEART) == ("\u2764", ())


def test_fill_defaults() -> None:
    concepts = {s: parse_emoji(s, "") for s in (THUMB, THUMB + DARK, RUNNER, RUNNER + JOINER + FEMALE, GHOST)}
    filled = fill_defaults(concepts)
    assert filled[THUMB].attributes == (("skin tone", "default"),)
    assert filled[THUMB + DARK].attributes == (("skin tone", "dark"),)
    assert filled[RUNNER].attributes == (("gender", "person"),)
    assert filled[GHOST].attributes == ()


def test_font_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(emoji_font, "_fontconfig_path", lambda: None)
    monkeypatch.setattr(emoji_font, "_FOLDERS", (str(tmp_path),))
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-noto-color-emoji"):
        find_emoji_font()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_emoji_font(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="expected a font file or a folder"):
        read_emoji(font=tmp_path)


def test_font_found_without_fontconfig(monkeypatch: pytest.MonkeyPatch, font: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    link = tmp_path / "deep" / "er" / emoji_font.FONT_FILE
    link.symlink_to(font)
    monkeypatch.setattr(emoji_font, "_fontconfig_path", lambda: None)
    monkeypatch.setattr(emoji_font, "_FOLDERS", (str(tmp_path),))
    assert find_emoji_font() == find_emoji_font(tmp_path) == link


def test_not_an_emoji_font(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font at all")
    with pytest.raises(ValueError, match=r"broken\.ttf"):
        EmojiPainter(broken)
    matplotlib = pytest.importorskip("matplotlib")
    text_font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    with pytest.raises(ValueError, match="colour-emoji font"):
        EmojiPainter(text_font)


def test_painter_refuses_what_is_not_one_picture(font: Path) -> None:
    painter = EmojiPainter(font)
    assert not isinstance(painter.paint(GHOST), str)
    assert painter.paint("\U0010fffd") == "the font has no picture of it"
    if can_shape():
        # Fonts draw a flag with a question mark for regions they do not know.
        assert painter.paint("\U0001f1fd\U0001f1fd") == "the font has no picture of it"
    assert painter.paint(GHOST + GHOST) in (
        "the font draws it as several pictures",
        "needs text shaping, which this Pillow lacks (libraqm)",
    )


def test_painter_without_shaping(font: Path) -> None:
    painter = EmojiPainter(font, shaping=False)
    assert not isinstance(painter.paint(GHOST), str)
    assert not isinstance(painter.paint(HEART), str)
    for sequence in (THUMB + DARK, "\U0001f1eb\U0001f1f7", WOMAN + JOINER + "\u2695\ufe0f"):
        assert painter.paint(sequence) == "needs text shaping, which this Pillow lacks (libraqm)"


def test_shaping_asked_for_but_missing(font: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_font, "can_shape", lambda: False)
    with pytest.raises(ValueError, match="libraqm"):
        EmojiPainter(font, shaping=True)


def test_pictures_show_the_emoji(font: Path) -> None:
    pictures = draw_emoji([HEART, "\U0001f499", "\U0010fffd"], font=font, size=40)
    assert pictures.pixels.shape == (2, 40, 40, 3)
    assert list(pictures.skipped) == ["\U0010fffd"]
    red, blue = pictures.pixels[:, 18, 20].astype(int)
    assert red[0] > red[2] + 80
    assert blue[2] > blue[0] + 80
    assert (pictures.pixels[:, 0, 0] == 255).all()


def test_sizes_are_checked(font: Path) -> None:
    with pytest.raises(ValueError, match="size: expected 8 to 512"):
        draw_emoji([GHOST], font=font, size=4)
    with pytest.raises(TypeError, match="size: expected an int, got float"):
        draw_emoji([GHOST], font=font, size=64.0)


def test_cache(font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [GHOST, HEART, "\U0010fffd"]
    plain = draw_emoji(sequences, font=font, size=24)
    first = draw_emoji(sequences, font=font, size=24, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    monkeypatch.setattr(emoji_font, "_draw", lambda *_: pytest.fail("drawn again in spite of the cache"))
    again = draw_emoji(sequences, font=font, size=24, cache=tmp_path)
    assert plain.sequences == first.sequences == again.sequences
    assert plain.digests == again.digests
    assert plain.skipped == again.skipped
    np.testing.assert_array_equal(plain.pixels, again.pixels)
    np.testing.assert_array_equal(plain.thumbnails, again.thumbnails)
    monkeypatch.undo()

    draw_emoji(sequences, font=font, size=32, cache=tmp_path)
    draw_emoji(sequences[:1], font=font, size=24, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3

    (folder / "pixels.npy").write_bytes(b"half a fi")
    with pytest.warns(UserWarning, match="unreadable emoji cache"):
        repaired = draw_emoji(sequences, font=font, size=24, cache=tmp_path)
    np.testing.assert_array_equal(plain.pixels, repaired.pixels)


def test_full_disk_leaves_nothing(font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        draw_emoji([GHOST], font=font, size=24, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def _concept(sample: Sample) -> Concept:
    return Concept(sample.metadata["base"], tuple(sorted(sample.metadata["attributes"].items())))


def test_every_emoji_is_accounted_for(dataset: SampleSet) -> None:
    import emoji

    qualified = sum(e["status"] == emoji.STATUS["fully_qualified"] for e in emoji.EMOJI_DATA.values())
    assert len(dataset) + dataset.skips.skipped == qualified
    assert len(dataset) > 3000
    assert dataset.splits == {
        "train": len(dataset) - 675,
        "test_compositional": 300,
        "test_unseen": 150,
        "val_compositional": 150,
        "val_unseen": 75,
    }


def test_pictures_are_distinct(dataset: SampleSet) -> None:
    seen = Counter(PixelRow.__call__(sample.image).tobytes() for sample in dataset)
    # Two that differ at the font's own size may still meet at 32 pixels, but hardly any do.
    assert sum(count - 1 for count in seen.values()) <= 5
    names = [sample.captions[0] for sample in dataset]
    assert len(set(names)) == len(names)


def test_compositional_parts(dataset: SampleSet) -> None:
    train = [_concept(sample) for sample in dataset.select("train")]
    bases = {concept.base for concept in train}
    values = {value for concept in train for value in concept.attributes}
    combinations = {concept.key for concept in train}
    taken: set[object] = set()
    for part in ("test_compositional", "val_compositional"):
        for sample in dataset.select(part):
            concept = _concept(sample)
            assert concept.attributes
            assert concept.base in bases
            assert set(concept.attributes) <= values
            assert concept.key not in combinations
            assert concept.key not in taken
            taken.add(concept.key)


def test_unseen_parts(dataset: SampleSet, font: Path, cache: Path) -> None:
    bases = {part: [_concept(s).base for s in dataset.select(part)] for part in ("train", *PARTS)}
    seen = {base for part in ("train", "test_compositional", "val_compositional") for base in bases[part]}
    pictures = {s.key: np.asarray(s.image()).reshape(-1) / 255.0 for s in dataset}
    train = np.stack([pictures[s.key] for s in dataset.select("train")])
    for part in ("test_unseen", "val_unseen"):
        assert len(set(bases[part])) == len(bases[part])
        assert not set(bases[part]) & seen
        for sample in dataset.select(part):
            distance = np.sqrt(((train - pictures[sample.key]) ** 2).mean(axis=1).min())
            assert distance >= NEAR_DUPLICATE, sample.captions[0]
    assert not set(bases["test_unseen"]) & set(bases["val_unseen"])


def test_unseen_names_have_no_variation_in_training(dataset: SampleSet) -> None:
    trained = {split_tones(s.metadata["emoji"])[0].split(JOINER)[0] for s in dataset.select("train")}
    for part in ("test_unseen", "val_unseen"):
        for sample in dataset.select(part):
            first = split_tones(sample.metadata["emoji"])[0].split(JOINER)[0]
            # An adult may be anybody: a new trade is a new concept, a cat in another colour is not.
            assert first not in trained or first in (MAN, WOMAN, ADULT), sample.captions[0]


def test_split_is_deterministic(dataset: SampleSet, cache: Path) -> None:
    again = read_emoji(size=32, cache=cache)
    assert [(s.key, s.split, s.captions, s.tags) for s in again] == [
        (s.key, s.split, s.captions, s.tags) for s in dataset
    ]
    other = read_emoji(size=32, cache=cache, seed=1)
    test = {s.key for s in dataset.select("test_unseen")}
    assert test != {s.key for s in other.select("test_unseen")}


def test_captions_and_tags(dataset: SampleSet) -> None:
    languages = emoji_languages()
    assert len(languages) == 14
    assert languages[0] == "en"
    for sample in dataset:
        assert tuple(sample.languages) == languages
        assert all(caption and "_" not in caption and ":" not in caption[:1] for caption in sample.captions)
    by_emoji = {sample.metadata["emoji"]: sample for sample in dataset}
    ghost = by_emoji[GHOST]
    assert dict(zip(ghost.languages, ghost.captions, strict=True))["de"] == "gespenst"
    assert by_emoji["\U0001f1e9\U0001f1ea"].captions[0] == "flag: Germany"
    assert any("skin tone" in sample.captions[0] for sample in dataset)
    drawn_alike = [sample for sample in dataset if sample.metadata["aliases"]]
    assert drawn_alike
    assert {sample.split for sample in drawn_alike} == {"train"}


def test_samples_travel_to_other_processes(dataset: SampleSet) -> None:
    sample = dataset[0]
    copy = pickle.loads(pickle.dumps(sample))
    assert copy.image().tobytes() == sample.image().tobytes()
    assert copy.image().size == (32, 32)


def test_languages_and_keywords(font: Path, cache: Path, tmp_path: Path, dataset: SampleSet) -> None:
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (annotations / "de.xml").write_text(
        f'<ldml><annotations><annotation cp="{THUMB}">Daumen | gut</annotation>'
        f'<annotation cp="{THUMB}" type="tts">Daumen hoch</annotation></annotations></ldml>',
        encoding="utf-8",
    )
    samples = read_emoji(
        size=32, cache=cache, languages=["de", "en"], keyword_languages=["de"], cldr=tmp_path
    )
    thumb = next(s for s in samples if s.metadata["emoji"] == THUMB + DARK)
    assert thumb.languages == ["de", "en"]
    assert thumb.captions[1] == "thumbs up dark skin tone"
    assert thumb.tags[:2] == ["Daumen", "gut"]

    with pytest.raises(ValueError, match=r"sizes: expected some of test_compositional, .*, got train"):
        read_emoji(sizes={"train": 3})
    with pytest.raises(ValueError, match=r"languages: expected some of en, .*got \['tlh'\]"):
        read_emoji(languages=["tlh"])
    with pytest.raises(FileNotFoundError, match=r"annotations/fr\.xml"):
        read_emoji(size=32, cache=cache, keyword_languages=["fr"], cldr=tmp_path)
    (annotations / "de.xml").write_text("<ldml><annotations>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"de\.xml: expected a CLDR annotations file"):
        read_emoji(size=32, cache=cache, keyword_languages=["de"], cldr=tmp_path)


def test_missing_keywords_are_reported(
    dataset: SampleSet, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jrl.data.emoji.CLDR_FOLDER", tmp_path)
    samples = read_emoji(size=32, cache=cache)
    assert any("'en'" in reason and "unicode-cldr-core" in reason for reason in samples.skips.notes)


def test_without_shaping_what_is_lost_is_counted(
    font: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("jrl.data.emoji", "jrl.data.emoji_font"):
        monkeypatch.setattr(f"{module}.can_shape", lambda: False)
    sizes = {"test_compositional": 2, "test_unseen": 20, "val_compositional": 2, "val_unseen": 10}
    samples = read_emoji(size=32, cache=cache, sizes=sizes)
    assert {part: samples.splits[part] for part in sizes} == sizes
    assert samples.skips.counts["needs text shaping, which this Pillow lacks (libraqm)"] > 2000
    assert any("libraqm" in reason for reason in samples.skips.notes)
    assert len(samples) > 1000
