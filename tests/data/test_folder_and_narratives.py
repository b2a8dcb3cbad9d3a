"""Plain folders and Localized Narratives in their true form."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jrl.data.readers import FormatError, read_folder, read_localized_narratives
from jrl.data.sample import TimedWord
from tests.data.fixtures import coco_captions, narrative, write_json, write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = write_pictures(
        tmp_path / "pictures",
        "b.png",
        "a.JPG",
        "sub/写真 ü.webp",
        "sub/lonely.png",
        "sub/blank.png",
        "two.jpg",
        "two.png",
    )
    (root / "b.txt").write_bytes(b"\xef\xbb\xbffirst\r\n\r\n  second  \r\n")
    (root / "a.txt").write_text("caption of a")
    (root / "sub/写真 ü.txt").write_text("ein Bild\n", encoding="utf-8")
    (root / "sub/blank.txt").write_text("\n  \n")
    (root / "two.txt").write_text("twice")
    (root / "orphan.txt").write_text("no picture")
    write_pictures(root, "__MACOSX/x.png", ".hidden/y.png", "._b.png")
    return root


def test_pairs_are_found_in_subfolders(folder: Path) -> None:
    samples = read_folder(folder, language="de", split="train")
    found = {sample.key: sample.captions for sample in samples}
    assert found == {
        "a.JPG": ["caption of a"],
        "b.png": ["first", "second"],
        "sub/写真 ü.webp": ["ein Bild"],
        "two.jpg": ["twice"],
        "two.png": ["twice"],
    }
    assert samples[1].languages == ["de", "de"]
    assert samples.skips.counts == {"image file missing": 1, "no caption": 2}
    assert "blank.txt holds no caption" in samples.skips.summary()
    assert "orphan.txt has no picture" in samples.skips.summary()
    assert samples.name == "pictures"


def test_pictures_without_captions_on_request(folder: Path) -> None:
    samples = read_folder(folder, require_captions=False)
    assert len(samples) == 7
    assert {sample.key for sample in samples if not sample.captions} == {"sub/lonely.png", "sub/blank.png"}


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    os.symlink(folder, folder / "sub" / "loop", target_is_directory=True)
    assert len(read_folder(folder)) == 5


def test_empty_missing_and_captionless_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no picture \(.jpg, .*\) in the folder"):
        read_folder(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="root: .*gone: no such folder"):
        read_folder(tmp_path / "gone")
    with pytest.raises(NotADirectoryError, match="is a file"):
        read_folder(write_pictures(tmp_path, "a.png") / "a.png")
    with pytest.raises(
        ValueError, match="no usable sample; 1 skipped\n +no caption: 1\n.*a.png: no text file"
    ):
        read_folder(tmp_path)


@pytest.fixture
def narratives(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "val2017", "000000000139.jpg", "000000000285.jpg")
    lines = [
        json.dumps(narrative("139", "In this picture there is a table.", annotator=1)),
        json.dumps(narrative("285", "A bear.", annotator=2)),
        json.dumps(narrative("139", "A woman is standing.", annotator=3)),
        json.dumps(narrative("632", "No such picture.")),
        json.dumps({**narrative("285", " "), "caption": " "}),
        '{"image_id": "285", "caption": "cut o',
        json.dumps({"caption": "of nothing"}),
    ]
    (tmp_path / "coco_val_localized_narratives.jsonl").write_text("\r\n".join(lines), newline="")
    return tmp_path


def test_narratives_of_several_annotators_become_captions(narratives: Path) -> None:
    samples = read_localized_narratives(
        narratives / "coco_val_localized_narratives.jsonl", narratives / "val2017", split="val"
    )
    assert [sample.key for sample in samples] == ["139", "285"]
    first = samples[0]
    assert first.captions == ["In this picture there is a table.", "A woman is standing."]
    assert first.metadata == {"dataset_id": "mscoco_val2017", "annotator_ids": [1, 3]}
    assert first.timed_words[1] == [
        TimedWord("A", 0.0, 0.5),
        TimedWord("woman", 1.0, 1.5),
        TimedWord("is", 2.0, 2.5),
        TimedWord("standing.", 3.0, 3.5),
    ]
    assert len(first.traces) == 2
    assert len(first.traces[0]) == 7
    stroke = first.traces[0][1]
    assert stroke.dtype == np.float32
    np.testing.assert_allclose(stroke, [[0, -0.02, 1], [0.1, -0.02, 1.1], [0.2, -0.02, 1.2]], rtol=1e-6)
    assert samples.skips.counts == {"image file missing": 1, "no caption": 1, "malformed row": 2}


def test_gzip_shards_and_own_names(narratives: Path) -> None:
    images = write_pictures(narratives / "open", "x-139.png")
    shards = []
    for number, caption in enumerate(("one", "two")):
        shards.append(narratives / f"open_images-0000{number}-of-00002.jsonl.gz")
        shards[-1].write_bytes(gzip.compress(json.dumps(narrative("139", caption)).encode() + b"\n"))
    samples = read_localized_narratives(shards, images, file_name=lambda entry: f"x-{entry['image_id']}.png")
    assert samples[0].captions == ["one", "two"]
    assert samples.name == "open_images-00000-of-00002"
    shards[1].write_bytes(shards[1].read_bytes()[:-12])
    with pytest.raises(FormatError, match="00001-of-00002.jsonl.gz: damaged gzip file"):
        read_localized_narratives(shards, images)
    with pytest.raises(ValueError, match="at least one file, got none"):
        read_localized_narratives([], images)


def test_a_broken_trace_costs_the_trace_only(narratives: Path) -> None:
    entries = [
        narrative("139", "one"),
        narrative("139", "two"),
        narrative("139", "three"),
        narrative("139", "four"),
    ]
    entries[0]["traces"] = [[{"x": 1}]]
    entries[1]["timed_caption"] = [{"utterance": "two", "start_time": "soon", "end_time": 1}]
    entries[2]["traces"] = [[{"x": float("nan"), "y": 0, "t": 0}]]
    path = narratives / "broken.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    samples = read_localized_narratives(path, narratives / "val2017")
    assert [len(strokes) for strokes in samples[0].traces] == [0, 0, 0, 1]
    assert samples.skips.notes == {"broken trace or timed caption dropped": 3}


def test_narratives_refuse_other_formats(narratives: Path) -> None:
    path = write_json(narratives / "captions.json", coco_captions())
    with pytest.raises(
        FormatError, match="captions.json: expected Localized Narratives.*looks like COCO captions"
    ):
        read_localized_narratives(path, narratives / "val2017")
    (narratives / "tokens").write_text("a.jpg#0\tcaption\n")
    with pytest.raises(FormatError, match="looks like Flickr30k tokens"):
        read_localized_narratives(narratives / "tokens", narratives / "val2017")
    with pytest.raises(FormatError, match="looks like a picture"):
        read_localized_narratives(narratives / "val2017/000000000139.jpg", narratives / "val2017")
