"""The command line, end to end on a folder of pictures, and its error messages."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from jrl.cli import main
from jrl.training import SystemModule

CONFIGS = Path(__file__).parents[2] / "configs"
Config = Callable[..., dict[str, Any]]


def write(path: Path, config: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run of `jrl fit` that the tests read and do not change."""
    folder = tmp_path_factory.mktemp("trained")
    pictures = request.getfixturevalue("pictures")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    values = {
        "trainer": {
            "max_epochs": 25,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "lr": 2e-3,
            "system": {
                "class_path": "jrl.systems.CLIP",
                "init_args": {
                    "image_encoder": {
                        "class_path": "jrl.encoders.ImageEncoder",
                        "init_args": {
                            "model": {"model_type": "vit", "image_size": 32, "patch_size": 8, **small}
                        },
                    },
                    "text_encoder": {
                        "class_path": "jrl.encoders.TextEncoder",
                        "init_args": {"model": {"model_type": "bert", "vocab_size": 300, **small}},
                    },
                    "projection_dim": 16,
                },
            },
        },
        "data": {
            "dataset": "folder",
            "options": {"root": str(pictures)},
            "image_size": 32,
            "batch_size": 8,
            "vocab_size": 300,
            "val_fraction": 0.2,
            "test_splits": ["val"],
        },
        "monitor": "val/mean_recall",
    }
    run = folder / "run"
    assert main(["fit", "--config", write(folder / "config.yaml", values), "--run", str(run)]) == 0
    return run


def test_fit_leaves_everything_in_its_folder(trained: Path) -> None:
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert {
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "config.yaml",
        "model/model.safetensors",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any("writing" in name for name in names)


def test_curves_are_logged(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/contrastive", "train/scale", "train/accuracy_x_to_y", "train/lr", "val/val/t2i_r1"} <= tags
    losses = [event.value for event in events.Scalars("train/contrastive")]
    assert len(losses) == 100
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_validate_and_test_print_the_table(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--config", str(trained / "config.yaml"), "--run", str(trained)]) == 0
    assert "val/mean_recall" in capsys.readouterr().out
    assert main(["test", "--config", str(trained / "config.yaml"), "--run", str(trained)]) == 0
    output = capsys.readouterr().out
    assert "test/val/i2t_r10" in output
    assert "| val | image to text |" in output
    assert "| val | text to image |" in (trained / "test.md").read_text(encoding="utf-8")
    results = json.loads((trained / "test.json").read_text(encoding="utf-8"))["val"]
    assert results["pictures"] == 13
    assert 0.6 < results["mean_recall"] <= 1


def test_retrieve_finds_and_draws(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.png"
    assert main(["retrieve", "--run", str(trained), "a large red circle", "--k", "6", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("large-red-circle") == 1
    assert text.count("-red-") >= 2  # chance is 1 of 6
    with Image.open(out) as grid:
        assert grid.size == (5 * 136 + 8, 2 * 136 + 8)


def test_retrieve_searches_a_folder_for_several_texts(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for name in ("large-red-circle", "small-blue-bar", "large-green-frame"):
        shutil.copy(pictures / f"{name}.png", some)
    arguments = [
        "retrieve",
        "--run",
        str(trained),
        "red circle",
        "blue bar",
        "--images",
        str(some),
        "--k",
        "9",
    ]
    assert main([*arguments, "--out", str(tmp_path / "grid.png")]) == 0
    text = capsys.readouterr().out
    assert text.count("large-green-frame.png") == 2
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 136 + 8, 2 * 136 + 8)


def test_embed_counts_what_it_skips(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(pictures, images)
    (images / "broken.png").write_bytes((images / "large-red-bar.png").read_bytes()[:60])
    (images / "empty.jpg").write_bytes(b"")
    (images / "notes.txt").write_text("no picture")
    (images / ".hidden.png").write_bytes(b"x")
    out = tmp_path / "deep" / "e.safetensors"
    assert main(["embed", "--run", str(trained), "--images", str(images), "--out", str(out)]) == 0
    report = capsys.readouterr().out
    assert "48 pictures, 2 skipped" in report
    assert "empty.jpg" in report
    assert "broken.png" in report
    embeddings = load_file(out)["embeddings"]
    assert embeddings.shape == (48, 16)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(48), atol=1e-5)
    with safe_open(out, "pt") as file:
        files = json.loads(file.metadata()["files"])
    assert files == sorted(path.name for path in pictures.glob("*.png"))
    assert [path.name for path in out.parent.iterdir()] == ["e.safetensors"]


def test_embeddings_do_not_depend_on_the_batch(trained: Path, pictures: Path, tmp_path: Path) -> None:
    for size in ("7", "48"):
        command = ["embed", "--run", str(trained), "--images", str(pictures), "--batch-size", size]
        assert main([*command, "--out", str(tmp_path / size)]) == 0
    one, other = (load_file(tmp_path / size)["embeddings"] for size in ("7", "48"))
    assert torch.allclose(one, other, atol=1e-5)


def errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr().err
    line = captured.strip().splitlines()[-1]
    assert line.startswith("jrl: error: ")
    assert "Traceback" not in captured
    return line


def test_errors_are_one_line_that_names_the_matter(
    trained: Path, pictures: Path, tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run, embed = str(trained), ["embed", "--images", str(pictures), "--out", str(tmp_path / "e")]
    assert "command" in errors(["train"], capsys)
    assert "absent: no such run" in errors([*embed, "--run", str(tmp_path / "absent")], capsys)
    assert "holds no exported system" in errors([*embed, "--run", str(tmp_path)], capsys)
    assert "images: no folder" in errors(["embed", "--run", run, "--images", "absent", "--out", "e"], capsys)
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in errors(
        ["embed", "--run", run, "--images", str(tmp_path / "empty"), "--out", "e"], capsys
    )
    (tmp_path / "empty" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "broken.png" in errors(
        ["embed", "--run", run, "--images", str(tmp_path / "empty"), "--out", "e"], capsys
    )
    assert "k: expected at least 1" in errors(["retrieve", "--run", run, "red", "--k", "0"], capsys)
    assert "blank" in errors(["retrieve", "--run", run, "  ", "--images", str(pictures)], capsys)
    again = ["fit", "--config", str(trained / "config.yaml"), "--run", run]
    assert "--resume true, --overwrite true" in errors(again, capsys)
    fresh = str(tmp_path / "fresh")
    for data, words in (
        ({"dataset": "cocoa"}, "cocoa"),
        ({"options": {"folder": "x"}}, "the reader of 'folder' does not know folder; its options are root"),
        ({"options": {}}, "the reader of 'folder' needs root; its options are root, "),
        ({"options": {"root": str(tmp_path / "absent")}}, "absent"),
        ({"vocab_size": 5000, "tokenizer": str(tmp_path / "absent")}, "tokenizer"),
        ({"batch_size": 500}, "batch_size"),
        ({"image_size": 48}, "48"),
        ({"val_fraction": 1.5}, "val_fraction"),
    ):
        path = write(tmp_path / "config.yaml", config(data=data))
        assert words in errors(["fit", "--config", path, "--run", fresh], capsys), data
    path = write(tmp_path / "config.yaml", config())
    assert "no checkpoint to go on from" in errors(
        ["fit", "--config", path, "--run", fresh, "--resume", "true"], capsys
    )
    assert "no checkpoint" in errors(["validate", "--config", path, "--run", fresh], capsys)
    with pytest.raises(FileNotFoundError):
        main(["embed", "--run", str(tmp_path / "absent"), "--images", "x", "--out", "y", "--traceback"])


def test_unreadable_runs(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    command = ["embed", "--run", str(run), "--images", str(pictures), "--out", str(tmp_path / "e")]
    weights, checkpoint = run / "model" / "model.safetensors", run / "checkpoints" / "last.ckpt"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:500])
    assert "model.safetensors: unreadable or truncated" in errors(command, capsys)
    weights.write_bytes(whole)
    (run / "model" / "preprocessing.json").write_text("{}")
    assert "preprocessing.json" in errors(command, capsys)
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    resume = ["fit", "--config", str(run / "config.yaml"), "--run", str(run), "--resume", "true"]
    assert "last.ckpt: unreadable or truncated" in errors(resume, capsys)
    assert not (tmp_path / "e").exists()


def test_bad_configuration_is_refused_before_anything_runs(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config()
    values["model"]["learning_rate"] = 1.0
    path = write(tmp_path / "config.yaml", values)
    assert "learning_rate" in errors(["fit", "--config", path, "--run", str(tmp_path / "run")], capsys)
    path = write(tmp_path / "config.yaml", config(data={"batch_size": "many"}))
    assert "batch_size" in errors(["fit", "--config", path, "--run", str(tmp_path / "run")], capsys)
    assert "run" in errors(["fit", "--config", write(tmp_path / "config.yaml", config())], capsys)
    assert not (tmp_path / "run").exists()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jrl.cli", *arguments]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def test_resume_after_sigkill_ends_as_an_uninterrupted_run(tmp_path: Path, config: Config) -> None:
    path = write(tmp_path / "config.yaml", config(trainer={"max_epochs": 40}))
    options = ["fit", "--config", path, "--run"]
    every = ["--checkpoint_every", "1"]
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    with subprocess.Popen(
        command(*options, str(tmp_path / "cut"), *every),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        deadline = time.monotonic() + 120
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    stopped = torch.load(last, weights_only=True)["global_step"]
    assert 0 < stopped < 160
    assert main([*options, str(tmp_path / "cut"), "--resume", "true"]) == 0
    saved = yaml.safe_load((tmp_path / "cut" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["resume"] is saved["overwrite"] is False
    assert saved["ckpt_path"] is None
    assert main([*options, str(tmp_path / "whole")]) == 0
    cut, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("cut", "whole"))
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    assert [file.name for file in last.parent.iterdir()] == ["last.ckpt"]


def test_overwrite_starts_anew_and_interrupt_resumes(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = [
        "fit",
        "--config",
        write(tmp_path / "config.yaml", config(trainer={"max_epochs": 2})),
        "--run",
        str(run),
    ]
    assert main(command) == 0
    old = list(run.glob("events.out.tfevents.*"))

    def interrupt(self: Any, *_: Any) -> None:
        if self.trainer.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SystemModule, "on_train_batch_end", interrupt)
        assert main([*command, "--overwrite", "true"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not any(path.exists() for path in old)
    assert not (run / "model").exists()
    assert main([*command, "--resume", "true"]) == 0
    assert (run / "model" / "model.safetensors").is_file()


def test_two_processes_train_as_one_with_both_batches(tmp_path: Path, config: Config) -> None:
    def run(name: str, trainer: dict[str, Any], batch_size: int) -> dict[str, torch.Tensor]:
        values = config(
            trainer={"max_epochs": 2, **trainer}, data={"batch_size": batch_size, "augment": None}
        )
        # AdamW's first steps are signs of gradients, which rounding may turn where they are nearly zero
        values["model"]["eps"] = 0.01
        for part in ("image_encoder", "text_encoder"):
            model = values["model"]["system"]["init_args"][part]["init_args"]["model"]
            model.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        done = subprocess.run(
            command(
                "fit", "--config", write(tmp_path / f"{name}.yaml", values), "--run", str(tmp_path / name)
            ),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=170,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        # 35 pictures make 2 steps of 16 an epoch
        assert (
            torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
        )
        return load_file(tmp_path / name / "model" / "model.safetensors")

    two, one = run("two", {"devices": 2, "strategy": "ddp"}, 8), run("one", {"devices": 1}, 16)
    assert two.keys() == one.keys()
    for name, weight in one.items():
        assert float((two[name] - weight).abs().max()) < 1e-6, name


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_name_what_exists(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the largest networks need not be orthogonal to be built
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight: weight)
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(path), "--print_config"])
    assert caught.value.code == 0
    values = yaml.safe_load(capsys.readouterr().out)
    size = 0
    for part in values["model"]["system"]["init_args"].values():
        # an encoder out of another run is named by its folder
        if (
            isinstance(part, dict)
            and "class_path" in part
            and not isinstance(part["init_args"].get("model"), str)
        ):
            module, _, kind = part["class_path"].rpartition(".")
            built = getattr(importlib.import_module(module), kind)(**part["init_args"])
            size += len(list(built.parameters()))
    assert size > 20


def test_generated_scenes_train(tmp_path: Path) -> None:
    options = "{train: 140, val: 10, test: 10, test_compositional: 10, size: 64, languages: [en]}"
    run = str(tmp_path / "run")
    command = ["fit", "--config", str(CONFIGS / "clip_scenes.yaml"), "--run", run, "--data.options", options]
    assert main([*command, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]) == 0
    assert main(["test", "--config", f"{run}/config.yaml"]) == 0


def test_help_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "retrieve" in capsys.readouterr().out
    assert main([]) == 2
