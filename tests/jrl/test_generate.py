"""`jrl generate`: pictures, frames and animations of a run's descriptions; the drawing of samples while it trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import yaml
from PIL import Image

from jrl.cli import main
from jrl.data.sample import Sample
from jrl.encoders import ImageEncoder, TextEncoder
from jrl.systems import CLIP
from jrl.training import Run, SystemModule, drawing
from jrl.training.command import run_at_checkpoint
from jrl.training.drawing import DrawSamples, draw

from .generation_fixtures import VIT
from .xmc_gan_fixtures import BERT, data

TEXT = "a large red circle"


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs, drawn every five batches."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"image_size": 32, "text_dim": 16, "width": 4}
    system = {
        "class_path": "jrl.systems.XMCGAN",
        "init_args": {
            "generator": {
                "class_path": "jrl.systems.xmc_gan.Generator",
                "init_args": {**sizes, "noise_dim": 6, "condition_dim": 5},
            },
            "discriminator": {"class_path": "jrl.systems.xmc_gan.Discriminator", "init_args": sizes},
            "text_encoder": {"class_path": "jrl.encoders.TextEncoder", "init_args": {"model": BERT}},
            "average_decay": 0.5,
        },
    }
    config = {
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "precision": "bf16-mixed",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "jrl.training.DrawSamples", "init_args": {"every": 5, "count": 2}}],
        },
        "model": {"lr": 1e-3, "warmup": 0.0, "channels_last": True, "system": system},
        "data": {
            "dataset": "folder",
            "options": {"root": str(pictures)},
            "image_size": 32,
            "batch_size": 8,
            "vocab_size": 300,
            "max_length": 12,
            "padding": "max_length",
            "val_splits": [],
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
        },
    }
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(path), "--run", str(folder)]) == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_samples_while_training(run: Path) -> None:
    """Mixed precision trains, and the samples are there: 8 texts x 2 pictures of 64 pixels and gaps of 4."""
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "batch-0000005.png", "batch-0000010.png"
    ]  # fmt: skip
    with Image.open(run / "samples" / "batch-0000010.png") as grid:
        assert grid.size == (2 * 68 + 4, 8 * 68 + 4)


def test_pictures_of_a_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for out, seed in ((first, 0), (again, 0), (other, 1)):
        arguments = [TEXT, "--run", str(run), "--n", "3", "--seed", str(seed), "--out", str(out)]
        assert main(["generate", *arguments]) == 0
    assert f"{first}: 1 x 3 pictures of 32 pixels, and grid.png" in capsys.readouterr().out
    found = files(first)
    assert list(found) == ["grid.png", "text000-000.png", "text000-001.png", "text000-002.png"]
    assert found == files(again)
    assert all(found[name] != files(other)[name] for name in found)
    assert len(set(found.values())) == 4
    with Image.open(first / "text000-000.png") as picture:
        assert picture.size == (32, 32) and picture.mode == "RGB"


def test_a_picture_does_not_depend_on_the_others(run: Path) -> None:
    opened = Run.load(run)
    many = draw(
        opened.system, opened.tokenizer, [TEXT, "a small blue bar"], max_length=12, count=4, batch_size=3
    )
    one = draw(opened.system, opened.tokenizer, [TEXT], max_length=12, count=1)
    assert many.shape == (2, 4, 3, 32, 32)
    torch.testing.assert_close(many[0, 0], one[0, 0], rtol=1e-5, atol=1e-5)
    assert float((many[0, 0] - many[0, 1]).abs().max()) > 1e-3
    assert float((many[0, 0] - many[1, 0]).abs().max()) > 1e-3


@pytest.mark.parametrize("animation", ["gif", "webp"])
def test_film_of_a_file(run: Path, tmp_path: Path, animation: str) -> None:
    descriptions = tmp_path / "descriptions.txt"
    descriptions.write_text(f"{TEXT}\n\na small blue bar\na green frame\n")
    out = tmp_path / "film"
    arguments = ["--file", str(descriptions), "--run", str(run), "--out", str(out), "--size", "2"]
    assert main(["generate", *arguments, "--animation", animation, "--fps", "4"]) == 0
    frames = [f"frames-{place:04d}.png" for place in range(3)]
    assert set(files(out)) == {f"frames.{animation}", *frames, "grid.png"}
    with Image.open(out / f"frames.{animation}") as film:
        assert film.n_frames == 3 and film.size == (64, 64)
        film.seek(1)
        film.load()
        assert film.info["duration"] == 250


def test_frames_of_another_film_go(run: Path, tmp_path: Path) -> None:
    """And nothing else that lies there."""
    for name in (
        "frames-0007.png",
        "frames003-0000.png",
        "frames.webp",
        "frames-of-mine.png",
        "text000-000.png",
    ):
        (tmp_path / name).write_bytes(b"old")
    descriptions = tmp_path / "descriptions.txt"
    descriptions.write_text(f"{TEXT}\na small blue bar\n")
    assert main(["generate", "--file", str(descriptions), "--run", str(run), "--out", str(tmp_path)]) == 0
    assert set(files(tmp_path)) == {
        "descriptions.txt", "frames-0000.png", "frames-0001.png", "frames-of-mine.png", "frames.gif", "grid.png",
        "text000-000.png",
    }  # fmt: skip


def test_checkpoint_of_a_run_that_still_trains(run: Path, tmp_path: Path) -> None:
    """The same pictures from the export and from the last checkpoint, whose moving average draws."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    opened, exported = run_at_checkpoint(tmp_path / "run", "last"), Run.load(run)
    pictures = [draw(r.system, r.tokenizer, [TEXT], max_length=12, count=2) for r in (opened, exported)]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    latest = draw(opened.system, opened.tokenizer, [TEXT], max_length=12, count=2, averaged=False)
    assert float((latest - pictures[0]).abs().max()) > 1e-2
    assert (
        main(["generate", TEXT, "--run", str(run), "--checkpoint", "last", "--out", str(tmp_path / "out")])
        == 0
    )
    assert len(files(tmp_path / "out")) == 9


def test_what_is_cut_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a red circle " * 9
    assert main(["generate", long, "--run", str(run), "--n", "1", "--out", str(tmp_path)]) == 0
    assert "only the first 12 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "texts, file: give descriptions, or --file with one a line"),
        ([TEXT, "--file", "x"], "texts, file: give descriptions, or --file"),
        ([" "], "texts: expected words, got a blank text (number 1)"),
        ([TEXT, "--n", "0"], "n: expected at least 1, got 0"),
        ([TEXT, "--seed", "-1"], "seed: expected at least 0, got -1"),
        ([TEXT, "--fps", "0"], "fps: expected more than 0 and at most 100 for gif, got 0.0"),
        ([TEXT, "--fps", "5000"], "fps: expected more than 0 and at most 100 for gif, got 5000.0"),
        (
            [TEXT, "--fps", "1001", "--animation", "webp"],
            "fps: expected more than 0 and at most 1000 for webp",
        ),
        (["--file", "nowhere.txt"], "file: no such file nowhere.txt"),
        ([TEXT, "--checkpoint", "best"], "checkpoint: neither best nor "),
    ],
)
def test_errors(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments, "--run", str(run)]) == 2
    assert f"jrl: error: {message}" in capsys.readouterr().err


def test_empty_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    assert main(["generate", "--file", str(path), "--run", str(run)]) == 2
    assert "holds no description" in capsys.readouterr().err
    path.write_bytes(b"\xff\xfe")
    assert main(["generate", "--file", str(path), "--run", str(run)]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_other_systems_do_not_generate(run: Path, pictures: Path) -> None:
    opened = Run.load(run)
    with pytest.raises(
        ValueError, match="system: TextEncoder does not generate pictures; expected an XMCGAN"
    ):
        draw(opened.system.text_encoder, opened.tokenizer, [TEXT], max_length=12)
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        DrawSamples(every=0)
    module = SystemModule(CLIP(ImageEncoder(VIT), TextEncoder(BERT), projection_dim=8))
    with pytest.raises(ValueError, match="system: CLIP does not generate pictures; expected an XMCGAN"):
        lightning.Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            callbacks=[DrawSamples()],
            accelerator="cpu",
        ).fit(module, data(pictures))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "texts: expected at least one"),
        ({"texts": [TEXT, " "]}, r"texts: expected words, got a blank text \(number 2\)"),
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_samples_are_refused_before_the_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrawSamples(**options)


def test_samples_are_in_the_languages_of_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first caption of the first pictures in them, not the first of all."""
    drawn: list[str] = []

    def keep(system: Any, tokenizer: Any, texts: list[str], **rest: Any) -> torch.Tensor:
        drawn.extend(texts)
        return torch.zeros(8, 1, 3, 4, 4)

    monkeypatch.setattr(drawing, "draw", keep)
    samples = [Sample(str(n), b"", [f"rot {n}", f"red {n}"], ["de", "en"]) for n in range(9)]
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
    source = SimpleNamespace(
        train_split="train",
        val_splits=("val",),
        parts=("val",),
        samples=lambda part: samples,
        eval_languages=["en"],
        tokenizer=None,
        max_length=8,
    )
    trainer: Any = SimpleNamespace(
        fit_loop=loop, is_global_zero=True, datamodule=source, default_root_dir=tmp_path
    )
    module: Any = SimpleNamespace(system=None)
    DrawSamples(every=1, count=1).on_train_batch_end(trainer, module, None, None, 0)
    assert drawn == [f"red {n}" for n in range(8)]
