"""The sample, the set that holds samples, and the report of what was skipped."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jrl.data.sample import Phrase, Sample, SampleSet, SceneObject, SkipReport
from tests.data.fixtures import picture


def sample(key: str, split: str = "") -> Sample:
    return Sample(key, picture(), ["one", "two"], split=split)


def test_defaults_and_languages() -> None:
    first, second = sample("a"), sample("b")
    assert first.languages == ["und", "und"]
    assert first.objects is not second.objects
    with pytest.raises(ValueError, match=r"sample 'a': languages must have one entry a caption \(2\), got 1"):
        Sample("a", picture(), ["one", "two"], languages=["en"])


def test_a_sample_with_everything_survives_pickling() -> None:
    full = Sample(
        "a",
        Path("a.png"),
        ["a red ball"],
        objects=[SceneObject("ball", ("red",), (0.0, 0.0, 4.0, 4.0), 1)],
        relations=[(0, "touches", 0)],
        phrases=[Phrase(0, 2, 10, (0,))],
        mask=np.ones((4, 4), dtype=np.uint8),
    )
    again = pickle.loads(pickle.dumps(full))
    assert again.objects == full.objects
    assert again.phrases == full.phrases
    assert (again.load_mask() == 1).all()


def test_masks_from_a_file_and_a_function(tmp_path: Path) -> None:
    one = sample("a")
    assert one.load_mask() is None
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    PIL.Image.fromarray(values).save(tmp_path / "mask.png")
    one.mask = tmp_path / "mask.png"
    assert np.array_equal(one.load_mask(), values)
    one.mask = lambda: values
    assert one.load_mask() is values
    one.mask = values.astype(np.float32)
    with pytest.raises(ValueError, match="float32"):
        one.load_mask()


def test_sets_select_slice_and_refuse_repeated_keys() -> None:
    skips = SkipReport()
    skips.add("broken", "x")
    whole = SampleSet(
        [sample("a", "train"), sample("b", "val"), sample("c", "train")], name="toy", skips=skips
    )
    assert whole.splits == {"train": 2, "val": 1}
    assert [one.key for one in whole.select("train")] == ["a", "c"]
    assert whole.select("val").name == "toy/val"
    assert whole.select("val").skips is skips
    assert [one.key for one in whole[1:]] == ["b", "c"]
    assert whole[-1].key == "c"
    assert copy.copy(whole)[0] is whole[0]
    assert repr(whole) == "SampleSet('toy', 3 samples, splits={'train': 2, 'val': 1}, 1 skipped)"
    with pytest.raises(
        ValueError, match=r"dataset 'toy' has no split 'test'; it has \{'train': 2, 'val': 1\}"
    ):
        whole.select("test")
    with pytest.raises(ValueError, match="dataset 'toy': key 'a' occurs twice"):
        SampleSet([sample("a"), sample("a")], name="toy")


def test_report_counts_and_keeps_some_examples() -> None:
    report = SkipReport(limit=2)
    assert report.summary() == "nothing skipped"
    for number in range(3):
        report.add("gone", f"file {number}")
    report.add("row", "line 9", count=4)
    report.note("renamed", "a became b")
    assert report.skipped == 7
    assert report.summary() == (
        "7 skipped\n  row: 4\n    line 9\n  gone: 3\n    file 0\n    file 1\n  noted: renamed: 1\n    a became b"
    )
    other = SkipReport()
    other.add("gone", "file 8")
    other.merge(report)
    assert other.counts == {"gone": 4, "row": 4}
    assert other.examples["gone"] == ["file 8", "file 0", "file 1"]
    report.raise_if_empty(1, "x")
    with pytest.raises(ValueError, match="x.json: no usable sample; 7 skipped"):
        report.raise_if_empty(0, "x.json")
