"""`jrl demo`: a short run end to end, its reuse, its resumption, and what it says when something is missing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from jrl.cli import main
from jrl.data.emoji_font import find_emoji_font
from jrl.demo import REPORT, font
from jrl.demo.figures import read_curves
from jrl.demo.train import Record

ROOT = Path(__file__).parents[2]
SCENES = "{train: 64, val: 8, test: 16, test_compositional: 12, size: 32, languages: [en], max_objects: 1}"
PART = "--model.system.init_args.{}_encoder.init_args.model"
SMALL = [
    PART.format("image"),
    "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
    PART.format("text"),
    "{model_type: bert, vocab_size: 300, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1}",
]
SIZES = ["--data.image_size", "32", "--data.batch_size", "16", "--data.vocab_size", "300"]
SHORT = [*SMALL, *SIZES, "--data.options", SCENES]
TINY = [*SHORT, "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
FEW = ["--loss-batches", "8,16"]


def no_font(path: object = None) -> Path:
    raise FileNotFoundError("no colour-emoji font found")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished short demo on a machine that has no emoji font and may install none."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(font, "find_emoji_font", no_font)
        assert main(["demo", "--out", str(folder), "--no-install", *FEW, *TINY]) == 0
    return folder


def test_everything_is_written_and_nothing_is_left_over(demo: Path) -> None:
    names = {str(path.relative_to(demo)) for path in demo.rglob("*") if path.is_file()}
    assert {*REPORT, "model/model.safetensors", "checkpoints/last.ckpt", "config.yaml", "demo.json"} <= names
    assert not any("writing" in name or ".part" in name for name in names)
    for name in ("curves.png", "retrieval.png", "loss_cost.png"):
        with Image.open(demo / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 20, f"{name} is blank"


def test_the_numbers_are_complete(demo: Path) -> None:
    metrics = json.loads((demo / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["training"]["steps"] == 8
    assert metrics["training"]["seconds"] > 0 < metrics["training"]["cpu_seconds"]
    assert metrics["training"]["pieces"] == 1
    retrieval = metrics["evaluation"]["retrieval"]
    assert list(retrieval) == ["test", "test_compositional"]
    for result in retrieval.values():
        assert {"i2t_r1", "t2i_r10", "i2t_median_rank", "bound_nats", "bound_ceiling"} <= result.keys()
        assert result["t2i_chance_r1"] == pytest.approx(1 / result["pictures"])
    assert {task["task"] for task in metrics["evaluation"]["zero_shot"]} == {
        "colour of a lone shape",
        "lone shape",
    }
    assert metrics["evaluation"]["among_all"]["test"]["candidates"] == 100
    assert [row["batch"] for row in metrics["loss_cost"]["rows"]] == [8, 16]
    for query in metrics["evaluation"]["queries"]:
        assert len(query["found"]) == 5
        if query["right"] in query["found"]:
            assert query["found"].index(query["right"]) + 1 <= query["rank"]


def test_the_report_says_what_was_done(demo: Path) -> None:
    text = (demo / "report.md").read_text(encoding="utf-8")
    assert "no colour-emoji font is installed: --no-install was given" in text
    assert "--trainer.max_epochs 2" in text
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (demo / name).is_file()
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)


def test_retrieve_and_embed_use_the_run(demo: Path, pictures: Path, tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.png", tmp_path / "e.safetensors"
    assert main(["retrieve", "--run", str(demo), "a red circle", "--out", str(grid)]) == 0
    assert main(["embed", "--run", str(demo), "--images", str(pictures), "--out", str(out)]) == 0
    assert grid.is_file()
    assert out.is_file()


def test_a_second_run_reuses_and_mends(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}
    assert main(["demo", "--out", str(demo)]) == 0
    assert "already trained" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}
    (demo / "curves.png").unlink()
    (demo / "metrics.json").write_text("{broken")
    assert main(["demo", "--out", str(demo), *FEW]) == 0
    assert "metrics.json: unreadable" in capsys.readouterr().err
    assert all((demo / name).is_file() for name in REPORT)
    json.loads((demo / "metrics.json").read_text(encoding="utf-8"))
    weights = demo / "model" / "model.safetensors"
    assert weights.stat().st_mtime_ns == before[weights]


def test_other_loss_batches_are_measured_again(demo: Path) -> None:
    assert main(["demo", "--out", str(demo), "--loss-batches", "4,8"]) == 0
    metrics = json.loads((demo / "metrics.json").read_text(encoding="utf-8"))
    assert [row["batch"] for row in metrics["loss_cost"]["rows"]] == [4, 8]


def test_a_demo_killed_before_its_export_exports_without_training(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = demo / "model" / "model.safetensors"
    trained = weights.read_bytes()
    record = Record.load(demo)
    assert record is not None
    record.training = {}
    record.save(demo)
    weights.unlink()
    (demo / "model" / "preprocessing.json").unlink()
    assert main(["demo", "--out", str(demo), *FEW]) == 0
    assert "resuming the interrupted training at step 8" in capsys.readouterr().err
    assert weights.read_bytes() == trained


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "jrl.cli", "demo", *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts what it puts into the background with interrupts ignored, and so would be this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_interrupted_and_killed_demos_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    last = run / "checkpoints" / "last.ckpt"
    epochs = ["--trainer.max_epochs", "12"]
    arguments = ["--out", str(run), "--data", "scenes", *FEW, *SHORT, *epochs]
    stops = []
    for sent in (signal.SIGINT, signal.SIGKILL):
        written = last.stat().st_mtime_ns if last.exists() else 0
        with start(*arguments) as process:
            deadline = time.monotonic() + 100
            while process.poll() is None and time.monotonic() < deadline:
                if last.exists() and last.stat().st_mtime_ns > written:
                    break
                time.sleep(0.02)
            process.send_signal(sent)
            errors = process.stderr.read() if process.stderr else ""
        stops.append(torch.load(last, weights_only=True)["global_step"])
        assert process.returncode == (130 if sent == signal.SIGINT else -sent), errors
        assert ("the same command goes on" in errors) == (sent == signal.SIGINT)
        assert not (run / "report.md").exists()
    assert 0 < stops[0] < stops[1] < 48
    # the end of it in this process, cut short by the saved configuration
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["trainer"]["max_epochs"] == 12
    assert main(["demo", "--out", str(run), *FEW]) == 0
    assert f"resuming the interrupted training at step {stops[1]}" in capsys.readouterr().err
    training = json.loads((run / "demo.json").read_text(encoding="utf-8"))["training"]
    assert training["steps"] == 48
    assert training["pieces"] == 3
    assert "summed over 3 pieces" in (run / "report.md").read_text(encoding="utf-8")
    steps = [step for step, _ in read_curves(run)["train/contrastive"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 40


def error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["demo", *arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_conflicts_with_what_is_there_are_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(demo)]
    assert "holds a demo on scenes, got emoji" in error([*out, "--data", "emoji"], capsys)
    assert "was begun with" in error([*out, "--trainer.max_epochs", "3"], capsys)
    assert "--run: `jrl demo` decides this itself" in error([*out, "--run=elsewhere"], capsys)
    assert "got 'more'" in error([*out, "more"], capsys)
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in error(["--out", str(file)], capsys)
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints" / "last.ckpt").write_bytes(b"precious")
    assert "not a demo's" in error(["--out", str(other), "--fresh"], capsys)
    assert (other / "checkpoints" / "last.ckpt").read_bytes() == b"precious"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "demo.json").write_text("{}")
    assert "demo.json: not the record of a demo" in error(["--out", str(broken)], capsys)
    fresh = ["--out", str(tmp_path / "new"), "--data", "scenes"]
    assert "trainer.speed" in error([*fresh, "--trainer.speed", "1"], capsys)
    # what was refused leaves nothing that a better command would conflict with
    assert "trainer.haste" in error([*fresh, "--trainer.haste", "1"], capsys)


def test_fresh_removes_the_demo_and_nothing_else(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "demo.json").write_bytes((demo / "demo.json").read_bytes())
    (run / "report.md").write_text("old")
    (run / "notes.txt").write_text("mine")
    arguments = ["--out", str(run), "--fresh", "--data", "scenes", *SHORT, "--data.batch_size", "1000"]
    assert "batch_size" in error(arguments, capsys)
    assert {path.name for path in run.iterdir()} >= {"notes.txt"}
    assert not {path.name for path in run.iterdir()} & {"model", "report.md"}


def test_emoji_asked_for_without_a_font(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(font, "find_emoji_font", no_font)
    message = error(["--out", str(tmp_path / "run"), "--data", "emoji", "--no-install"], capsys)
    assert "emoji were asked for, but no colour-emoji font is installed: --no-install was given" in message
    assert not (tmp_path / "run").exists()


def has_font() -> bool:
    try:
        find_emoji_font()
    except FileNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not has_font(), reason="needs the colour-emoji font")
def test_emoji_are_judged_by_the_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = f"{{size: 32, cache: {tmp_path / 'cache'}, languages: [en, de]}}"
    short = [*SMALL, *SIZES, "--data.options", options, "--trainer.max_steps", "2"]
    assert main(["demo", "--out", str(run), "--no-install", *FEW, *short]) == 0
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    bars = metrics["evaluation"]["bars"]
    assert [(bar["part"], bar["direction"], bar["bar"]) for bar in bars] == [
        ("test_compositional", "i2t", 0.85),
        ("test_compositional", "t2i", 0.85),
        ("test_unseen", "i2t", 0.3),
        ("test_unseen", "t2i", 0.3),
    ]
    assert not any(bar["met"] for bar in bars)
    missed = 100 * (0.85 - bars[0]["value"])
    assert f"| missed by {missed:.1f} points |" in (run / "report.md").read_text(encoding="utf-8")
    assert f"bar 85%: missed by {missed:.1f} points" in capsys.readouterr().err
    assert metrics["evaluation"]["retrieval"]["test_compositional"]["pictures"] == 300
    assert {task["task"] for task in metrics["evaluation"]["zero_shot"]} == {"skin tone", "gender"}
    assert all(task["pictures"] > 50 for task in metrics["evaluation"]["zero_shot"])
