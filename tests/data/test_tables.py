"""Flickr30k tokens, Conceptual Captions TSV and open_clip CSV in their true form."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from jrl.data.readers import FORMATS, FormatError, read, read_cc3m, read_cc12m, read_csv, read_flickr30k
from jrl.data.sample import SampleSet
from tests.data.fixtures import coco_captions, write_json, write_pictures, write_tar

TOKENS = (
    "1000092795.jpg#1\tTwo young , White males are outside near many bushes .\r\n"
    "1000092795.jpg#0\tTwo young guys with shaggy hair look at their hands .\r\n"
    "10002456.jpg#0\tSeveral men in hard hats\u2028operate a giant pulley system .\r\n"
    "2258277193_586949ec62.jpg.1#0\tpeople waiting\r\n"
    "\r\n"
    "a line that is none\r\n"
)


def written(path: Path, text: str | bytes, *, bom: bool = False) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + data)
    return path


@pytest.mark.parametrize("bom", [False, True])
def test_flickr_tokens(tmp_path: Path, bom: bool) -> None:
    images = write_pictures(tmp_path / "images", "1000092795.jpg", "10002456.jpg")
    path = written(tmp_path / "results_20130124.token", TOKENS, bom=bom)
    samples = read_flickr30k(path, images, split="train")
    assert [sample.key for sample in samples] == ["1000092795.jpg", "10002456.jpg"]
    assert samples[0].captions[0].startswith("Two young guys")
    assert samples[0].captions[1].endswith("bushes .")
    assert "\u2028" in samples[1].captions[0]
    assert samples.skips.counts == {"image file missing": 1, "malformed row": 1}
    assert f"{path}:6" in samples.skips.summary()


def test_a_line_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", "a.jpg")
    path = written(tmp_path / "tokens", b"a.jpg#0\tgood\na.jpg#1\tb\xe9d\n")
    samples = read_flickr30k(path, images)
    assert samples[0].captions == ["good"]
    assert samples.skips.counts == {"not UTF-8": 1}


def test_decomposed_file_names_are_found(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", unicodedata.normalize("NFD", "café.jpg"), "写真.jpg")
    composed = unicodedata.normalize("NFC", "café.jpg")
    path = written(tmp_path / "tokens", f"{composed}#0\ta café\n写真.jpg#0\ta photo\n")
    assert len(read_flickr30k(path, images)) == 2


CC_ROWS = (
    ("a very typical bus station", "https://lh6.example.org/photos/bus%20stop.jpg?w=640&h=480#top"),
    ("sierra looked stunning in this top", "http://example.org/content/top.jpg"),
    ("young confused girl", "HTTP://example.org/girl"),
    ("nothing here", "https://example.org/"),
    ("gone", "https://example.org/gone.jpg"),
    ("", "https://example.org/top.jpg"),
    ("outside", "https://example.org/..%2f..%2fetc%2fpasswd"),
)


@pytest.fixture
def conceptual(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "named", "bus stop.jpg", "top.jpg", "girl.png")
    write_pictures(tmp_path / "numbered", "000000000.jpg", "000000002.png")
    return tmp_path


@pytest.mark.parametrize(("reader", "swap"), [(read_cc3m, False), (read_cc12m, True)])
def test_conceptual_captions(conceptual: Path, reader: Callable[..., SampleSet], swap: bool) -> None:
    rows = [row[::-1] if swap else row for row in CC_ROWS]
    text = "".join("\t".join(row) + "\r\n" for row in rows) + "one cell\r\n"
    path = written(conceptual / "Train_GCC-training.tsv", text)
    samples = reader(path, conceptual / "named")
    assert [sample.key for sample in samples] == ["bus stop.jpg", "top.jpg", "girl.png"]
    assert samples[1].captions == ["sierra looked stunning in this top"]
    assert samples[1].metadata == {"url": "http://example.org/content/top.jpg", "row": 1}
    counts = dict(samples.skips.counts)
    assert counts.pop("malformed row") == 1
    assert counts.pop("no caption") == 1
    assert counts.pop("image file missing") + counts.pop("image path outside the image folder", 0) == 3
    assert not counts

    by_index = reader(path, conceptual / "numbered", files="index")
    assert [sample.metadata["row"] for sample in by_index] == [0, 2]
    by_rule = reader(path, conceptual / "named", files=lambda row, url: "top.jpg" if row < 2 else "../x")
    assert [sample.key for sample in by_rule] == ["top.jpg", "top.jpg#2"]
    assert by_rule.skips.notes["repeated key renamed"] == 1
    assert by_rule.skips.counts["image path outside the image folder"] == 4


def test_the_two_column_orders_are_told_apart(conceptual: Path) -> None:
    cc3m = written(conceptual / "cc3m.tsv", "a cat\thttps://example.org/top.jpg\n")
    cc12m = written(conceptual / "cc12m.tsv", "https://example.org/top.jpg\ta cat\n")
    with pytest.raises(FormatError, match=r"expected a CC12M TSV: no line .*looks like a CC3M TSV"):
        read_cc12m(cc3m, conceptual / "named")
    with pytest.raises(FormatError, match=r"expected a CC3M TSV: no line .*looks like a CC12M TSV"):
        read_cc3m(cc12m, conceptual / "named")
    with pytest.raises(ValueError, match="files must be 'basename', 'index' or a function, got 'url'"):
        read_cc3m(cc3m, conceptual / "named", files="url")


def test_open_clip_csv(tmp_path: Path) -> None:
    images = write_pictures(tmp_path, "im/a b.jpg", "im/ünï.png", "elsewhere/c.jpg")
    absolute = images / "elsewhere" / "c.jpg"
    text = (
        "filepath\ttitle\tscore\r\n"
        'im/a b.jpg\t"a ""quoted"" title\twith a tab"\t1\r\n'
        "im/a b.jpg\tsecond\t2\r\n"
        "im/ünï.png\tein Bild\t3\r\n"
        f"{absolute}\tabsolute\t4\r\n"
        "im/gone.jpg\tgone\t5\r\n"
        f"{absolute}.gone\tgone\t5\r\n"
        "../up.jpg\tup\t6\r\n"
        "im/a b.jpg\tshort\r\n"
        "\r\n"
        "im/ünï.png\t\t7\r\n"
    )
    samples = read_csv(written(tmp_path / "train.csv", text, bom=True))
    assert [(sample.key, sample.captions) for sample in samples] == [
        ("im/a b.jpg", ['a "quoted" title\twith a tab', "second"]),
        ("im/ünï.png", ["ein Bild"]),
        (str(absolute), ["absolute"]),
    ]
    assert samples[0].languages == ["und", "und"]
    assert samples.skips.counts == {
        "image file missing": 2,
        "image path outside the image folder": 1,
        "malformed row": 1,
    }
    assert samples.skips.notes == {"empty caption dropped": 1}


def test_csv_options(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", "a.jpg")
    path = written(tmp_path / "t.csv", "text,image\nhello,a.jpg\n")
    samples = read_csv(
        path, images, image_column="image", caption_column="text", delimiter=",", language="de", split="val"
    )
    assert (samples[0].captions, samples[0].languages, samples[0].split) == (["hello"], ["de"], "val")
    with pytest.raises(FormatError, match=r"no column 'filepath' in the header \['text,image'\]"):
        read_csv(path, images)
    with pytest.raises(ValueError, match="delimiter must be one character, got ', '"):
        read_csv(path, images, delimiter=", ")


def test_csv_with_broken_text(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    samples = read_csv(written(tmp_path / "t.csv", b"filepath\ttitle\na.jpg\tfine\na.jpg\tcaf\xe9\n"))
    assert samples[0].captions == ["fine"]
    assert samples.skips.counts == {"not UTF-8": 1}
    endless = b'filepath\ttitle\na.jpg\t"never closed' + b" and on" * 40_000
    with pytest.raises(FormatError, match=r"t.csv:2: field larger.*an unbalanced quote\?"):
        read_csv(written(tmp_path / "t.csv", endless))


def test_the_same_picture_by_two_names_is_one_key_each(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    text = f"filepath\ttitle\na.jpg\tone\n./a.jpg\ttwo\n{tmp_path / 'a.jpg'}\tthree\n"
    samples = read_csv(written(tmp_path / "t.csv", text))
    assert [(sample.key, sample.captions) for sample in samples] == [("a.jpg", ["one", "two", "three"])]


@pytest.mark.parametrize("name", ["flickr30k", "cc3m", "cc12m", "csv"])
def test_every_table_reader_recognises_other_files(tmp_path: Path, name: str) -> None:
    images = write_pictures(tmp_path / "images", "a.jpg")
    argument = "tokens" if name == "flickr30k" else "table"
    others = {
        "COCO captions": write_json(tmp_path / "coco", coco_captions()),
        "a tar archive": write_tar(tmp_path / "shard", [("a.txt", b"a")]),
        "a picture": images / "a.jpg",
    }
    for words, path in others.items():
        with pytest.raises(FormatError, match=f"{path.name}: expected .*looks like {words}"):
            read(name, images=images, **{argument: path})
    empty = written(tmp_path / "empty", "")
    with pytest.raises(FormatError, match="empty is empty"):
        read(name, images=images, **{argument: empty})
    with pytest.raises(FileNotFoundError, match="gone: no such file"):
        read(name, images=images, **{argument: tmp_path / "gone"})


def test_text_of_no_format_says_what_was_skipped(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", "a.jpg")
    path = written(tmp_path / "notes.txt", "dear\rdiary\ntoday\n")
    with pytest.raises(ValueError, match=r"notes.txt: no usable sample; 2 skipped\n +malformed row: 2"):
        read_flickr30k(path, images)


def test_read_lists_the_formats() -> None:
    with pytest.raises(ValueError, match="format must be one of .*cc12m, cc3m, coco.*got 'laion'"):
        read("laion")
    with pytest.raises(TypeError, match="nonsense"):
        read("folder", nonsense=1)
    assert {"coco", "karpathy", "flickr30k", "webdataset", "localized_narratives", "folder"} <= FORMATS.keys()
