"""Tar shards of img2dataset and WebDataset: indexed, streamed, damaged, and hostile."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import re
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from jrl.data.dataset import CaptionDataset
from jrl.data.images import ImageError, ImageTransform, load_image
from jrl.data.readers import FormatError, UnsafeTarError, expand_shards, read_webdataset
from jrl.data.readers.shards import expand_braces
from jrl.data.readers.streaming import StreamingCaptionDataset
from jrl.data.sample import Sample, SkipReport
from tests.data.fixtures import (
    Members,
    WordTokenizer,
    bomb_png,
    coco_captions,
    encoded,
    img2dataset_members,
    jpeg,
    picture,
    truncated_jpeg,
    write_json,
    write_tar,
)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(4):
        members = img2dataset_members(number * 10, 3, without_caption=(11,))
        write_tar(tmp_path / "cc" / f"{number:05d}.tar", members)
    (tmp_path / "cc" / "00000_stats.json").write_text("{}")
    return tmp_path / "cc"


def test_an_index_over_img2dataset_shards(shards: Path) -> None:
    samples = read_webdataset(shards, split="train", language="en")
    assert len(samples) == 11
    assert samples[4].key == "000000012"
    assert samples[4].captions == ["a picture of thing 12"]
    assert samples[4].metadata["url"] == "https://example.org/12.jpg"
    assert samples[4].metadata["shard"] == "00001.tar"
    assert samples.skips.counts == {"no caption": 1}
    assert samples.skips.notes == {}
    expected = load_image(jpeg(12)).tobytes()
    for sample in (samples[4], pickle.loads(pickle.dumps(samples[4]))):
        assert load_image(sample.image).tobytes() == expected
    assert len(read_webdataset(shards, require_captions=False)) == 12
    assert read_webdataset(shards, metadata=False)[0].metadata == {"shard": "00000.tar"}


def test_caption_from_the_record_and_other_suffixes(tmp_path: Path) -> None:
    record = json.dumps({"text": "from json", "caption": "wrong field"}).encode()
    members: Members = [
        ("./sub/a.PNG", encoded(picture(), "PNG")),
        ("./sub/a.json", record),
        ("./sub/a.seg.png", encoded(picture(), "PNG")),
        ("b.webp", encoded(picture(), "WEBP")),
        ("b.txt", "\ufeffthe text wins".encode()),
        ("b.json", record),
        ("c.jpeg", jpeg()),
        ("c.txt", b"not \xff text"),
        ("d.jpg", jpeg()),
        ("d.json", b"[1"),
        ("e.jpg", jpeg()),
        ("e.json", b"[1]"),
        ("f.txt", b"no picture"),
        ("__index__", b"skip me"),
        ("._a.png", b"skip me"),
    ]
    samples = read_webdataset(write_tar(tmp_path / "x.tar", members), caption_field="text")
    assert {sample.key: sample.captions for sample in samples} == {
        "sub/a": ["from json"],
        "b": ["the text wins"],
    }
    assert samples.skips.counts == {"no caption": 3, "image file missing": 1}
    assert samples.skips.notes == {"not UTF-8": 1, "malformed row": 2}


def test_repeated_keys_and_members_are_kept_apart(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a" / "0.tar", [("k.jpg", jpeg(1)), ("k.txt", b"one"), ("k.jpg", jpeg(2))])
    second = write_tar(tmp_path / "a" / "1.tar", [("k.txt", b"two"), ("x.jpg", jpeg()), ("k.png", jpeg(3))])
    third = write_tar(tmp_path / "b" / "1.tar", [("k.jpg", jpeg(4)), ("k.txt", b"three")])
    samples = read_webdataset([first, second, third])
    assert [(sample.key, *sample.captions) for sample in samples] == [
        ("k", "one"),
        ("1/k", "two"),
        ("1/k#2", "three"),
    ]
    assert load_image(samples[0].image).tobytes() == load_image(jpeg(1)).tobytes()
    assert samples.skips.notes == {"repeated key renamed": 2, "repeated member ignored": 1}
    assert samples.skips.counts == {"no caption": 1}


def hostile(kind: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(
        {
            "parent": "a/../../evil.jpg",
            "absolute": "/etc/evil.jpg",
            "drive": "C:evil.jpg",
            "backslash": "..\\evil.jpg",
        }.get(kind, "evil.jpg")
    )
    info.type = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }.get(kind, tarfile.REGTYPE)
    info.linkname = "/etc/passwd" if "link" in kind else ""
    return info


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("parent", "points outside the archive"),
        ("backslash", "points outside the archive"),
        ("absolute", "has an absolute name"),
        ("drive", "has an absolute name"),
        ("symlink", "is a link to '/etc/passwd'"),
        ("hardlink", "is a link to '/etc/passwd'"),
        ("device", "is a device"),
        ("fifo", "is a device"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_members_that_point_outside_are_refused(
    tmp_path: Path, kind: str, words: str, streaming: bool
) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("good.jpg")
        info.size = len(jpeg())
        archive.addfile(info, io.BytesIO(jpeg()))
        archive.addfile(hostile(kind))
    visit = partial(StreamingCaptionDataset, transform=ImageTransform(8)) if streaming else read_webdataset
    with pytest.raises(UnsafeTarError, match="hostile.tar: member .*evil.jpg") as caught:
        list(visit(path))
    assert words in str(caught.value)


def members_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as archive:
        return archive.getmembers()


def readable(path: Path) -> tuple[list[Sample], SkipReport]:
    """Return what a damaged tar still gives; when that is nothing, the error must say why."""
    try:
        samples = read_webdataset(path)
    except ValueError as error:
        if not re.search(
            rf"{path.name}: no usable sample.*(truncated tar: 1|may have been cut off)", str(error), re.DOTALL
        ):
            raise
        return [], SkipReport()
    return list(samples), samples.skips


def test_every_cut_of_a_tar_is_noticed(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", img2dataset_members(0, 3)).read_bytes()
    assert read_webdataset(tmp_path / "whole.tar").skips.skipped == 0
    ends = [
        member.offset_data + -(-member.size // 512) * 512 for member in members_of(tmp_path / "whole.tar")
    ]
    cut = tmp_path / "cut.tar"
    for length in range(512 * 5 + 100, ends[-1], 300):
        cut.write_bytes(whole[:length])
        samples, report = readable(cut)
        if not samples:
            continue
        at_a_boundary = length in ends
        assert len(samples) <= 3
        assert (report.notes["tar without an end mark"] == 1) == at_a_boundary
        assert (report.counts["truncated tar"] == 1) == (not at_a_boundary)
        for sample in samples:
            load_image(sample.image)
    cut.write_bytes(whole[: ends[-1]])
    assert read_webdataset(cut).skips.notes == {"tar without an end mark": 1}


def test_a_damaged_header_ends_the_shard_with_a_count(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "d.tar", img2dataset_members(0, 3))
    data = bytearray(path.read_bytes())
    offset = members_of(path)[3].offset
    data[offset : offset + 100] = b"x" * 100
    path.write_bytes(data)
    samples = read_webdataset(path)
    assert len(samples) == 1
    assert samples.skips.counts == {"truncated tar": 1}


def test_a_tar_that_shrinks_or_goes_is_a_bad_picture(shards: Path) -> None:
    samples = read_webdataset(shards / "00000.tar")
    data = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(data[:600])
    with pytest.raises(ImageError, match=r"00000.tar: 000000000.jpg: only 88 of \d+ bytes"):
        load_image(samples[0].image)
    (shards / "00000.tar").unlink()
    with pytest.raises(ImageError, match="00000.tar: 000000000.jpg: .*No such file"):
        load_image(samples[0].image)


def test_what_is_no_plain_tar_is_refused(tmp_path: Path) -> None:
    compressed = write_tar(tmp_path / "c.tar", img2dataset_members(0, 1), mode="w:gz")
    with pytest.raises(FormatError, match="c.tar: the tar is compressed.*decompress it"):
        read_webdataset(compressed)
    other = write_json(tmp_path / "o.tar", coco_captions())
    with pytest.raises(FormatError, match="o.tar: expected a tar: .*looks like COCO captions"):
        read_webdataset(other)
    (tmp_path / "e.tar").write_bytes(b"")
    with pytest.raises(FormatError, match="e.tar is empty"):
        read_webdataset(tmp_path / "e.tar")
    with pytest.raises(ValueError, match="z.tar: no usable sample; nothing skipped"):
        read_webdataset(write_tar(tmp_path / "z.tar", []))


def test_shards_by_folder_list_and_braces(shards: Path) -> None:
    names = ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    assert [path.name for path in expand_shards(shards)] == names
    assert [path.name for path in expand_shards(f"{shards}/{{00000..00003}}.tar")] == names
    assert [path.name for path in expand_shards([shards / names[1], f"{shards}/0000{{0,3}}.tar"])] == [
        names[1],
        names[0],
        names[3],
    ]
    with pytest.raises(FileNotFoundError, match="shards: 9 of 13 do not exist: .*00004.tar.*, \\.\\.\\."):
        expand_shards(f"{shards}/{{00000..00012}}.tar")
    with pytest.raises(ValueError, match=r"holds no \*.tar"):
        expand_shards(shards.parent)
    with pytest.raises(ValueError, match="at least one tar, got none"):
        expand_shards([])
    with pytest.raises(FileNotFoundError, match="pipe:"):
        expand_shards("pipe:cat /etc/passwd")


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("plain{x}", ["plain{x}"]),
        ("{5..5}", ["5"]),
    ],
)
def test_braces(pattern: str, expanded: list[str]) -> None:
    assert expand_braces(pattern) == expanded
    with pytest.raises(ValueError, match="runs backwards"):
        expand_braces("{3..1}")


def keys(dataset: Any, workers: int = 0, batch_size: int = 2) -> list[str]:
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=dataset.collate)
    return list(itertools.chain.from_iterable(batch["key"] for batch in loader))


def stream(shards: Path, **options: Any) -> StreamingCaptionDataset:
    return StreamingCaptionDataset(shards, ImageTransform(8), WordTokenizer(), **options)


@pytest.mark.filterwarnings("ignore:no caption")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_every_sample_once(shards: Path, workers: int) -> None:
    dataset = stream(shards)
    expected = sorted(sample.key for sample in read_webdataset(shards))
    first = keys(dataset, workers)
    assert sorted(first) == expected
    assert keys(dataset, workers) == first
    dataset.set_epoch(1)
    assert dataset.epoch == 1
    second = keys(dataset, workers)
    assert sorted(second) == expected
    assert second != first
    assert dataset.skips.counts == {"no caption": 3}
    in_order = keys(stream(shards, shuffle_buffer=0), workers)
    if workers == 0:
        assert in_order == expected


@pytest.mark.filterwarnings("ignore:no caption")
def test_a_streamed_item_is_that_of_the_index(shards: Path) -> None:
    indexed = CaptionDataset(read_webdataset(shards), ImageTransform(8), WordTokenizer(), captions="first")
    by_key = {item["key"]: item for item in (indexed[index] for index in range(len(indexed)))}
    for item in stream(shards):
        other = by_key[item["key"]]
        for field in ("image", "input_ids", "attention_mask"):
            assert torch.equal(item[field], other[field])
        assert item["caption"] == other["caption"]


@pytest.mark.filterwarnings("ignore:no caption")
def test_ranks_share_a_pass_and_give_equal_numbers(shards: Path) -> None:
    def of_rank(rank: int, count: int) -> list[str]:
        return keys(stream(shards, rank=rank, world_size=2, samples_per_epoch=count), workers=2)

    for count in (5, 9):
        assert [len(of_rank(rank, count)) for rank in range(2)] == [count, count]
    assert not set(of_rank(0, 4)) & set(of_rank(1, 4))
    with pytest.raises(ValueError, match="samples_per_epoch must be given with 2 ranks"):
        stream(shards, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, world_size=2\), got 2"):
        stream(shards, rank=2, world_size=2, samples_per_epoch=1)
    with pytest.raises(ValueError, match="4 cannot feed 5 ranks of 1 workers"):
        next(iter(stream(shards, rank=0, world_size=5, samples_per_epoch=1)))


def test_rank_comes_from_the_environment(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    dataset = stream(shards, samples_per_epoch=1)
    assert (dataset.rank, dataset.world_size) == (1, 3)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    members: Members = []
    pictures = {"a": jpeg(), "b": truncated_jpeg(), "c": bomb_png(), "d": b"", "e": jpeg(), "f": jpeg()}
    for key, data in pictures.items():
        members += [(f"{key}.jpg", data), (f"{key}.txt", b"caption")]
    members += [("a2.jpg", jpeg()), ("a2.jpg", jpeg()), ("a2.txt", b"twice"), ("g.txt", b"no picture")]
    path = write_tar(tmp_path / "damaged" / "0.tar", members)
    whole = write_tar(tmp_path / "damaged" / "1.tar", img2dataset_members(0, 2))
    whole.write_bytes(whole.read_bytes()[: os.path.getsize(whole) - 10240 - 512])
    return path.parent


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_counts_what_it_leaves_out(damaged: Path, workers: int) -> None:
    dataset = stream(damaged, shuffle_buffer=4)
    found = keys(dataset, workers)
    assert sorted(set(found) & {"a", "e", "f", "a2"}) == ["a", "a2", "e", "f"]
    assert dataset.skips.counts["image unreadable"] == 1
    assert dataset.skips.counts["image too large"] == 1
    assert dataset.skips.counts["image file empty"] == 1
    assert dataset.skips.counts["image file missing"] == 1
    assert dataset.skips.notes["repeated member ignored"] == 1


@pytest.mark.filterwarnings("ignore")
def test_a_stream_of_bad_pictures_stops(tmp_path: Path) -> None:
    members = list(
        itertools.chain.from_iterable(
            [(f"{number}.jpg", truncated_jpeg()), (f"{number}.txt", b"caption")] for number in range(70)
        )
    )
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(ImageError, match="64 of 64 pictures cannot be used, more than max_bad_fraction=0.5"):
        list(stream(path))
    few = write_tar(tmp_path / "few.tar", members[:4])
    for options in ({}, {"samples_per_epoch": 5}):
        with pytest.raises(ValueError, match="no usable sample; 2 skipped"):
            list(stream(few, **options))
    with (
        pytest.warns(UserWarning, match="image unreadable: .*few.tar: 0: cannot decode.*counted in .skips"),
        pytest.raises(ValueError, match="no usable sample"),
    ):
        list(stream(few))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples_per_epoch": 0}, "samples_per_epoch must be positive"),
        ({"shuffle_buffer": -1}, "shuffle_buffer and seed"),
        ({"seed": -1}, "shuffle_buffer and seed"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction"),
    ],
)
def test_stream_options_are_checked(shards: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stream(shards, **options)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        stream(shards).set_epoch(-1)
