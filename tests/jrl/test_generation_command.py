"""The commands from runs on disk to a classifier, a report and an ablation, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest

from jrl.cli import main
from jrl.generation import SceneClassifier, run_pairs
from jrl.generation.ablation import grouped
from tests.jrl.generation_fixtures import encoding_run, generating_run, save_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three generators, an encoder and a classifier."""
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("full-0", 0), ("full-1", 1), ("none-0", 2)):
        save_run(root / name, generating_run(seed))
    save_run(root / "encoder", encoding_run(9))
    SceneClassifier(32, 2).eval().save(root / "classifier")
    return root


def judging(folder: Path, samples: int = 16) -> list[str]:
    numbers = ["--samples", str(samples), "--candidates", "4", "--seed", "5"]
    return ["--features", str(folder / "classifier"), "--encoder", str(folder / "encoder"), *numbers]


def test_the_texts_are_of_the_run_and_beyond_its_training(folder: Path) -> None:
    pairs, others = run_pairs(folder / "full-0", 10, seed=1)
    assert len(pairs) == len(others) == 10
    keys = [pair.name for pair in (*pairs, *others)]
    # 4 and 2 scenes trained and chose; the test part is as long as asked for
    assert sorted(keys) == [f"scene-0-{index:06d}" for index in range(6, 26)]
    assert run_pairs(folder / "full-0", 10, seed=1)[0] == pairs
    assert run_pairs(folder / "full-0", 10, seed=2)[0] != pairs
    assert [len(some) for some in run_pairs(folder / "full-0", 2, part="val")] == [2, 0]
    with pytest.raises(
        ValueError, match="part: expected one of train, val, test, test_compositional, got 'dev'"
    ):
        run_pairs(folder / "full-0", 2, part="dev")
    with pytest.raises(ValueError, match="samples: expected at least 2, got 1"):
        run_pairs(folder / "full-0", 1)


def test_a_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(folder / "full-0"), tmp_path / "out"
    assert main(["generation-report", "--run", run, *judging(folder), "--out", str(out)]) == 0
    table = (out / "generation.md").read_text()
    assert table.splitlines()[0] == "|  | FID | IS | R-precision % | SOA-C % | SOA-I % | found unnamed % |"
    said = capsys.readouterr()
    assert table.strip() in said.out
    # the weights of this classifier are random
    assert "says nearly the same of all real pictures (inception score 1.0" in said.err
    values = json.loads((out / "generation.json").read_text())
    assert values["settings"]["samples"] == 16
    assert set(values["scores"]) == {run, "real pictures"}
    for scores in values["scores"].values():
        assert scores["pictures"] == 16 and scores["fid"] > 0 and 0 <= scores["r_precision"] <= 1
    assert main(["generation-report", "--run", run, *judging(folder), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "generation.json").read_bytes() == (out / "generation.json").read_bytes()


def test_an_ablation_over_seeds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [f"full={folder / 'full-0'}", f"full={folder / 'full-1'}", f"none={folder / 'none-0'}"]
    command = ["generation-ablation", *(word for run in runs for word in ("--run", run)), *judging(folder)]
    command += ["--out", str(tmp_path)]
    assert main(command) == 0
    values = json.loads((tmp_path / "ablation.json").read_text())
    fids = [values["scores"][values["runs"][run.split("=")[1]]["digest"]]["fid"] for run in runs]
    full, none = (values["variants"][name]["fid"] for name in ("full", "none"))
    assert full["mean"] == pytest.approx(fmean(fids[:2])) and full["deviation"] == pytest.approx(
        stdev(fids[:2])
    )
    assert none == {"mean": fids[2], "deviation": None, "values": fids[2:]}
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    assert lines[0] == "| variant | seeds | FID | IS | R-precision % | SOA-C % | SOA-I % | found unnamed % |"
    assert lines[2].startswith(f"| full | 2 | {full['mean']:.2f} ± {full['deviation']:.2f} | ")
    assert lines[3].startswith(f"| none | 1 | {none['mean']:.2f} | ")
    # what is judged is not judged again
    capsys.readouterr()
    assert main(command) == 0
    assert "judging" not in capsys.readouterr().err
    assert json.loads((tmp_path / "ablation.json").read_text()) == values
    # but under other settings it is
    assert main([*command, "--splits", "2"]) == 2
    assert "holds scores under other settings" in capsys.readouterr().err


def test_a_report_agrees_with_an_ablation(folder: Path, tmp_path: Path) -> None:
    run = str(folder / "none-0")
    assert main(["generation-report", "--run", run, *judging(folder), "--out", str(tmp_path / "a")]) == 0
    assert (
        main(["generation-ablation", "--run", f"none={run}", *judging(folder), "--out", str(tmp_path / "b")])
        == 0
    )
    one = json.loads((tmp_path / "a" / "generation.json").read_text())["scores"][run]
    (other,) = json.loads((tmp_path / "b" / "ablation.json").read_text())["scores"].values()
    assert one == other


def test_a_changed_configuration_is_judged_again(folder: Path, tmp_path: Path) -> None:
    """The same weights draw other pictures under another configuration, and read other texts with another tokenizer."""
    run = tmp_path / "run"
    shutil.copytree(folder / "full-0", run)
    command = ["generation-ablation", "--run", f"x={run}", *judging(folder), "--out", str(tmp_path / "out")]
    seen = []
    for file, before, after in (
        ("config.json", '"attention_scale": 15.0', '"attention_scale": 1.0'),
        ("preprocessing.json", '"max_length": 48', '"max_length": 6'),
        ("tokenizer/tokenizer.json", '"id": 0', '"id":  0'),
    ):
        assert main(command) == 0
        seen.append(json.loads((tmp_path / "out" / "ablation.json").read_text())["runs"][str(run)]["digest"])
        path = run / "model" / file
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))
    assert main(command) == 0
    values = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert len({*seen, values["runs"][str(run)]["digest"]}) == 4 == len(values["scores"])
    first, second, third, _ = (values["scores"][name]["fid"] for name in values["scores"])
    assert first != second != third


def test_a_report_without_objects(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that name none cost the object accuracy alone."""
    options = {"train": 4, "val": 2, "test": 2, "size": 32, "languages": ["de"]}
    run = save_run(tmp_path / "run", generating_run(0), options=options)
    command = ["generation-report", "--run", str(run), *judging(folder), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "no text names an object that the detector knows" in capsys.readouterr().err
    for scores in json.loads((tmp_path / "out" / "generation.json").read_text())["scores"].values():
        assert scores["soa_c"] is scores["soa_i"] is None and scores["fid"] > 0


def test_numbers_are_refused_before_anything_is_drawn(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["generation-report", "--run", str(folder / "full-0"), *judging(folder)]
    for arguments, message in (
        (["--splits", "0"], "splits: expected at least 1, got 0"),
        (["--splits", "17"], "splits: expected at most the 16 samples, got 17"),
        (["--candidates", "1"], "candidates: expected at least 2, got 1"),
        (["--samples", "1"], "samples: expected at least 2, got 1"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--part", "val", "--candidates", "16"], "texts: expected at least 16 different ones"),
    ):
        assert main([*run, *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and "looking at" not in said, said


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = ["generation-report", "--run", str(folder / "full-0")], ["--out", str(tmp_path / "out")]

    def error(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    assert "features, encoder: expected at least one of them" in error(*run, *out)
    assert "encoder: expected another run than the one that is judged" in error(
        *run, "--encoder", str(folder / "full-0"), "--samples", "16", "--candidates", "4", *out
    )
    shutil.copytree(folder / "full-0", tmp_path / "copy")
    assert "encoder: expected weights that no part of the generator was trained with" in error(
        *run, "--encoder", str(tmp_path / "copy"), "--samples", "16", "--candidates", "4", *out
    )
    assert "samples: expected at least the 100 candidates of R-precision, got 99" in error(
        *run, *judging(folder), "--samples", "99", "--candidates", "100", *out
    )
    assert "run: expected a system that generates pictures, an XMCGAN, got CLIP" in error(
        "generation-report", "--run", str(folder / "encoder"), *judging(folder), *out
    )
    other = save_run(
        tmp_path / "other",
        generating_run(3),
        options={"train": 4, "size": 32, "languages": ["en"], "seed": 1},
    )
    ablation = ["generation-ablation", "--run", f"a={folder / 'full-0'}", "--run", f"a={other}"]
    assert "its data are others than the first run's" in error(*ablation, *judging(folder), *out)
    assert "run: expected VARIANT=DIR, got 'runs/full'" in error(
        "generation-ablation", "--run", "runs/full", *judging(folder), *out
    )
    assert not (tmp_path / "out" / "generation.json").exists()
    with pytest.raises(ValueError, match="is given twice"):
        grouped(["a=runs/full", "b=runs/../runs/full"])


def test_the_classifier_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "classifier"
    command = ["scene-classifier", "--scenes", "64", "--epochs", "1", "--width", "2", "--max-objects", "1"]
    assert main([*command, "--out", str(out)]) == 0
    assert "16 scenes not trained on: recall" in capsys.readouterr().out
    assert SceneClassifier.load(out).width == 2
    assert json.loads((out / "recognition.json").read_text())["scenes"] == 16
    assert main(["scene-classifier", "--scenes", "63", "--out", str(out)]) == 2
    assert "scenes: expected at least 64, got 63" in capsys.readouterr().err
