"""What `jrl` says before it works for nothing: outputs that cannot be written, devices that are not there, runs in the way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jrl.cli import main
from tests.jrl.test_cli import errors, write

Config = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "device: expected cpu, cuda or cuda:1, got 'gpu'"), ("cuda:99", "GPUs, got 'cuda:99'; cpu")],
)
def test_devices(device: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in errors(["retrieve", "red", "--run", str(tmp_path), "--device", device], capsys)


def test_outputs_are_checked_before_the_run_is_opened(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    # opening this run would be an error of its own
    run = ["--run", str(tmp_path / "absent")]
    retrieve = ["retrieve", "red", *run, "--out"]
    assert "suffix '.txt'; .png is one" in errors([*retrieve, str(tmp_path / "a.txt")], capsys)
    assert f"out: {tmp_path} is a folder, expected a file" in errors([*retrieve, str(tmp_path)], capsys)
    embed = ["embed", *run, "--images", str(tmp_path), "--out", str(tmp_path)]
    assert f"out: {tmp_path} is a folder, expected a file" in errors(embed, capsys)
    file = tmp_path / "file"
    file.touch()
    assert f"out: {file} is a file" in errors(["generate", "a", *run, "--out", str(file)], capsys)
    for name in ("probe", "segment-report", "ground"):
        assert f"out: {file} is a file, expected a folder" in errors([name, *run, "--out", str(file)], capsys)
    fit = ["fit", "--config", write(tmp_path / "config.yaml", config()), "--run"]
    assert f"run: {file} is a file, expected a folder" in errors([*fit, str(file)], capsys)


def test_an_exported_system_is_not_trained_over(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "published"
    fit = ["fit", "--config", write(tmp_path / "config.yaml", config()), "--run", str(run)]
    kept = run / "model" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"somebody's weights")
    assert "holds a run; pass --overwrite true or another folder" in errors(fit, capsys)
    assert kept.read_bytes() == b"somebody's weights"
    assert main([*fit, "--overwrite", "true"]) == 0
    assert f"saved {run}; to evaluate it: jrl test" in capsys.readouterr().out
    assert kept.stat().st_size > 1000


def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    go_on = f"jrl fit --config {run}/config.yaml --run {run} --resume true"
    assert go_on in errors(["retrieve", "red", "--run", str(run)], capsys)


def test_refused_trainings_leave_one_log(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    bad = write(tmp_path / "config.yaml", config(data={"batch_size": 500}))
    for _ in range(3):
        assert "batch_size" in errors(["fit", "--config", bad, "--run", str(run)], capsys)
    assert len(list(run.glob("events.out.tfevents.*"))) <= 1


def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jrl.demo", None)
    assert "pip install 'jrl[train]'" in errors(["demo"], capsys)
