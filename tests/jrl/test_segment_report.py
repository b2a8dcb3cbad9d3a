"""Segmentation of scenes beside trivial answers: its parts, and `jrl segment-report` from a run to its files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from jrl.cli import main
from jrl.data.scenes import read_scenes
from jrl.evaluation.scene_segmentation import (
    BACKGROUND_TEXTS,
    Scenes,
    choose_background,
    class_texts,
    group_scenes,
    labelled,
    name_by_truth,
    predict,
    report,
    scene_names,
    score,
    to_markdown,
)

CONFIGS = Path(__file__).parents[2] / "configs"
SIDE, CELLS = 8, 4


class Reader:
    """Reads the class of a pixel off the picture itself, and thinks half as much of the background as it should."""

    def __init__(self, groups: int = 3) -> None:
        self.groups = groups

    def segment(self, pixel_values: Tensor, classes: Tensor, *, top_k: int | None) -> Any:
        assert top_k is None
        truth = pixel_values[:, 0].long()
        # the second background text fits; the first name scores 1.5 everywhere
        scores = F.one_hot(torch.where(truth == 0, 1, truth + len(BACKGROUND_TEXTS) - 1), len(classes))
        scores = scores.movedim(-1, 1) * torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0]).view(1, -1, 1, 1)
        scores[:, 3] = scores[:, 3].clamp(min=1.5)
        return SimpleNamespace(scores=scores)

    def group_maps(self, pixel_values: Tensor) -> Any:
        cells = F.max_pool2d(pixel_values[:, :1], SIDE // CELLS).flatten(1).long().clamp(max=self.groups - 1)
        hard = F.one_hot(cells, self.groups).float()
        return SimpleNamespace(hard_product=hard, hard=[hard], grid=(CELLS, CELLS))


def scenes() -> Scenes:
    truth = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    truth[0, :4, :4], truth[1, 4:, 4:] = 1, 2
    return Scenes(truth.float()[:, None].expand(-1, 3, -1, -1), truth, ("red circle", "blue square"))


def test_texts_become_classes_and_every_background_is_one() -> None:
    shown = scenes()
    texts = torch.eye(len(class_texts(shown.names)))
    assert class_texts(shown.names) == [*BACKGROUND_TEXTS, "red circle", "blue square"]
    light, right, heavy = predict(Reader(), shown.pixels, texts, (1.0, 1.7, 1e6))
    assert torch.equal(right, shown.truth.long())
    assert torch.equal(light, torch.where(shown.truth == 0, 1, shown.truth.long()))
    assert torch.equal(heavy, right)  # where no background text fits at all, no weight helps it
    assert choose_background(Reader(), shown, texts, (1.0, 1.7, 1.8)) == 1.7


def test_groups_are_counted_and_named_by_the_class_that_has_most_of_them() -> None:
    shown = scenes()
    groups = group_scenes(Reader(), shown.pixels)
    assert torch.equal(groups.pixels, shown.truth.long())
    assert (groups.used, groups.largest, groups.kinds) == (2.0, 0.75, 3)
    assert torch.equal(name_by_truth(groups.pixels, shown), shown.truth.long())
    # one group for all: the background has most of it, so it takes the rest
    assert not name_by_truth(torch.zeros(2, SIDE, SIDE, dtype=torch.int64), shown).any()
    # what is ignored has no vote
    hidden = Scenes(
        shown.pixels, torch.where(shown.truth == 0, 255, shown.truth.int()).to(torch.uint8), shown.names
    )
    named = name_by_truth(torch.zeros(2, SIDE, SIDE, dtype=torch.int64), hidden)
    assert named[0].unique().tolist() == [1] and named[1].unique().tolist() == [2]


def test_report_compares_with_the_best_trivial_answer() -> None:
    shown = scenes()
    texts = torch.eye(5)

    class Blank(Reader):
        def segment(self, pixel_values: Tensor, classes: Tensor, **options: Any) -> Any:
            scores = torch.zeros(len(pixel_values), len(classes), SIDE, SIDE)
            scores[:, 0] = 1.0
            return SimpleNamespace(scores=scores)

    found = report(Reader(), texts, Blank(), texts, shown, {"test": shown})
    assert found["background_weight"] == 2.0
    part = found["parts"]["test"]
    assert part["scores"]["system"]["mean_iou"] == part["scores"]["groups_named_by_truth"]["mean_iou"] == 1
    # the background alone: its share of the pixels, and nothing of the two others
    assert part["scores"]["single_class"]["mean_iou"] == pytest.approx(0.75 / 3)
    assert part["scores"]["untrained"] == score(torch.zeros_like(shown.truth), shown)
    assert part["times_trivial"] == pytest.approx(4.0)
    json.dumps(found)
    rows = to_markdown(found).splitlines()
    assert len(rows) == 2 + 5 and rows[2] == "| test | this system | 1.000 | 1.000 | 1.000 | 1.000 |"


def test_scenes_are_labelled_by_colour_and_shape() -> None:
    samples = list(read_scenes(train=6, val=0, test=0, test_compositional=0, size=32, languages=["en"]))
    names = scene_names(samples)
    assert list(names) == sorted(names) and all(len(name.split()) == 2 for name in names)
    found = labelled(samples, torch.zeros(6, 3, 32, 32), names)
    assert found.classes == len(names) + 1
    shown = {names[number - 1] for number in found.truth.unique().tolist() if number}
    assert shown <= set(names) and len(shown) >= len(names) - 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of the scenes for two steps."""
    pytest.importorskip("HanTa", reason="the tagger is part of jrl[train]")
    folder = tmp_path_factory.mktemp("segment_report")
    config = yaml.safe_load((CONFIGS / "group_vit_scenes.yaml").read_text(encoding="utf-8"))
    config["run"] = str(folder / "run")
    config["trainer"] |= {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
    config["data"]["options"] |= {"train": 32, "val": 8, "test": 8, "test_compositional": 6}
    config["data"]["batch_size"] = 16
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", str(path)]) == 0
    return folder / "run"


def test_command_writes_scores_table_and_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "out"
    arguments = ["segment-report", "--run", str(run), "--out", str(out), "--examples", "3"]
    assert main([*arguments, "--template", "{}", "a {}"]) == 0
    values = json.loads((out / "segment-report.json").read_text())
    assert set(values["parts"]) == {"val", "test", "test_compositional"}
    for part in values["parts"].values():
        assert set(part["scores"]) == {
            "system",
            "single_class",
            "random_groups",
            "untrained",
            "groups_named_by_truth",
        }
        assert 1 <= part["groups"]["used"] <= 16 and 0 < part["groups"]["largest"] <= 1
    assert values["templates"] == ["{}", "a {}"]
    assert (out / "segment-report.md").read_text().startswith("| part | answer | mIoU |")
    with PIL.Image.open(out / "segment-report.png") as picture:
        assert picture.format == "PNG" and picture.height > 300
    assert "times the mIoU of the best trivial answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--examples", "0"], "examples: expected at least 1"),
        (["--template", "a thing"], "template: expected '{}'"),
    ],
)
def test_bad_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segment-report", "--run", "nowhere", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_other_runs_are_refused(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segment-report", "--run", str(tmp_path / "nowhere")]) == 2
    assert "no such run" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "model").symlink_to(run / "model")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["data"] = {"dataset": "emoji"}
    (other / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["segment-report", "--run", str(other)]) == 2
    assert "expected one trained on 'scenes'" in capsys.readouterr().err
