"""`jrl probe` from a run's folder to its table and pictures, and its error messages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from jrl.cli import main
from jrl.data.images import ImageTransform
from jrl.data.scenes import read_scenes
from jrl.data.tokenizer import save_tokenizer, train_tokenizer
from jrl.downstream import TASKS, Classification, Result, ScenePart, probe, scene_parts
from jrl.downstream.probe import random_twin
from jrl.downstream.report import to_json, to_markdown
from jrl.encoders import ImageEncoder, TextEncoder
from jrl.evaluation import chance_recall
from jrl.systems import CLIP, CriticOptions, MutualInformation
from jrl.training.run import Run


def make_run(folder: Path, **image: Any) -> Path:
    """An untrained CLIP as `jrl fit` exports it."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    samples = read_scenes(train=50, val=0, test=0, test_compositional=0, held_out=0, languages=["en"])
    tokenizer = train_tokenizer(
        [sample.captions[0] for sample in samples], vocabulary_size=300, max_length=48
    )
    torch.manual_seed(0)
    system = CLIP(
        ImageEncoder({"model_type": "vit", "image_size": 32, "patch_size": 8, **small, **image}),
        TextEncoder({"model_type": "bert", "vocab_size": 300, "max_position_embeddings": 64, **small}),
        projection_dim=16,
    )
    system.save_pretrained(folder / "model")
    save_tokenizer(tokenizer, folder / "model" / "tokenizer")
    values = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "max_length": 48}
    (folder / "model" / "preprocessing.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def test_all_tasks_leave_a_table_and_pictures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["probe", "--run", str(run), "--out", str(out), "--scenes", "48", "--epochs", "1"]
    assert main([*command, "--against-random", "--seed", "3"]) == 0
    said = capsys.readouterr()
    assert said.err.count("random weights") == len(TASKS)
    assert all(task in said.out for task in TASKS)
    assert {path.name for path in out.iterdir()} == {
        "probe.json",
        "probe.md",
        *(f"{task}.png" for task in TASKS),
    }
    for task in TASKS:
        with Image.open(out / f"{task}.png") as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 50
    values = json.loads((out / "probe.json").read_text())
    assert values["scenes"] == {"train": 48, "val": 12, "test": 12}
    assert (values["system"], values["encoder"], values["seed"]) == ("CLIP", "frozen", 3)
    assert tuple(values["tasks"]) == TASKS
    for found in values["tasks"].values():
        assert found["metric"] in found["scores"]
        assert found["scores"].keys() == found["random"].keys() == found["baseline"].keys()
        assert all(0 <= value <= 1 for value in (*found["scores"].values(), *found["random"].values()))
    assert values["tasks"]["retrieval"]["baseline"]["i2t_r5"] == pytest.approx(chance_recall(5, 12))
    training = values["tasks"]["detection"]["training"]
    assert training["epochs"] == training["best_epoch"] == len(training["val_loss"]) == 1
    table = (out / "probe.md").read_text()
    assert table.startswith(
        "| task | score | this encoder | random weights | without the picture |\n|---|---|--:|"
    )
    assert "| **vqa** | **accuracy** | **" in table


def test_fine_tuning_and_no_random_twin(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (run / "model" / "model.safetensors").read_bytes()
    command = ["probe", "--run", str(run), "--scenes", "16", "--epochs", "1", "--tasks", "segmentation"]
    assert main([*command, "--finetune", "--max-objects", "1", "--out", str(tmp_path)]) == 0
    values = json.loads((tmp_path / "probe.json").read_text())
    assert values["encoder"] == "fine-tuned" and values["max_objects"] == 1
    assert values["tasks"]["segmentation"]["random"] is None
    assert "random" not in (tmp_path / "probe.md").read_text()
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    # without --out the results lie in the run
    assert main(command) == 0
    assert (run / "probe" / "segmentation.png").is_file()
    assert str(run / "probe") in capsys.readouterr().out.replace("\n", "")


def error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["probe", *arguments]) == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    line = captured.strip().splitlines()[-1]
    assert line.startswith("jrl: error: ")
    return line


def test_errors_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--run", str(run), "--out", str(tmp_path / "out")]
    few = [*here, "--scenes", "8"]
    assert "absent: no such run" in error(["--run", str(tmp_path / "absent")], capsys)
    assert "tasks: expected some of classification" in error([*here, "--tasks", "cooking"], capsys)
    assert "tasks: expected some of" in error([*here, "--tasks", ","], capsys)
    assert "'vqa' is named twice" in error([*few, "--tasks", "vqa,vqa"], capsys)
    assert "scenes: expected at least 8, got 4" in error([*here, "--scenes", "4"], capsys)
    assert "max_objects: expected 1 to 4, got 5" in error([*few, "--max-objects", "5"], capsys)
    assert "epochs: expected at least 1, got 0" in error([*few, "--epochs", "0"], capsys)
    assert "lr: expected a positive number" in error([*few, "--lr", "-1"], capsys)
    assert "seed: expected 0 or more, got -1" in error([*few, "--seed", "-1"], capsys)
    (tmp_path / "file").write_text("")
    assert "is a file" in error(["--run", str(run), "--out", str(tmp_path / "file")], capsys)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        main(["probe", "--run", str(tmp_path / "absent"), "--traceback"])
    assert "probe" in usage_of(capsys)


def usage_of(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--help"]) == 0
    return capsys.readouterr().out


def test_scenes_are_fixed_by_their_seed_and_not_those_of_training() -> None:
    transform = ImageTransform(32)
    one, two, three = (scene_parts(transform, train=6, val=2, test=3, seed=seed) for seed in (0, 0, 1))
    assert [len(part) for part in one.values()] == [6, 2, 3]
    assert one["train"].pixels.shape == (6, 3, 32, 32)
    captions = [[sample.captions[0] for sample in each["train"].samples] for each in (one, two, three)]
    assert captions[0] == captions[1] != captions[2]
    trained = {sample.captions[0] for sample in read_scenes(train=6, val=2, test=3, languages=["en"])}
    assert set(captions[0]) != trained
    keys = {sample.key for part in one.values() for sample in part.samples}
    assert len(keys) == 11
    with pytest.raises(ValueError, match="val: expected at least 2 scenes, got 1"):
        scene_parts(transform, train=2, val=1, test=2)


def test_the_random_twin_is_the_same_system_with_other_weights(run: Path) -> None:
    system = Run.load(run).system
    state = torch.get_rng_state()
    one, two, other = (random_twin(system, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(one) is type(system) and one.to_config() == system.to_config() and not one.training
    name = "image_projection.output.weight"
    assert torch.equal(one.state_dict()[name], two.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


class Marked(CLIP):
    """Embeds a picture and its caption in the same place: the position of the scene in its part."""

    def encode_image(self, pixel_values: torch.Tensor) -> Any:
        output = super().encode_image(pixel_values)
        output.global_ = torch.eye(16)[pixel_values[:, 0, 0, 0].round().long()]
        return output

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        output = super().encode_text(input_ids, attention_mask)
        output.global_ = torch.eye(16)[: len(input_ids)]
        return output


def test_retrieval_that_is_right_scores_one(run: Path) -> None:
    loaded = Run.load(run)
    loaded.system.__class__ = Marked
    data = scene_parts(loaded.transform, train=2, val=2, test=16)
    for place in range(16):
        data["test"].pixels[place, 0, 0, 0] = place
    found = probe(loaded, data, ["retrieval"])["retrieval"]
    assert set(found.scores.values()) == {1.0}
    assert found.baseline["i2t_r1"] == 1 / 16 and found.random is None
    # the wrong way round none is found first
    data["test"].pixels[:, 0, 0, 0] = data["test"].pixels[:, 0, 0, 0].flip(0)
    assert probe(loaded, data, ["retrieval"])["retrieval"].scores["i2t_r1"] == 0


def mutual_information(**options: Any) -> MutualInformation:
    torch.manual_seed(0)
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 1]}
    bert = {"model_type": "bert", "vocab_size": 300, "max_position_embeddings": 64}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoders = ImageEncoder({**resnet, "layer_type": "basic"}), TextEncoder({**bert, **small})
    return MutualInformation(*encoders, CriticOptions(dim=8, scale=None), **options)


def test_heads_look_through_the_encoder_alone(run: Path) -> None:
    """Neither a critic nor a projection has a part in what they see; retrieval compares what the system embeds."""
    loaded = Run.load(run)
    data = scene_parts(loaded.transform, train=8, val=4, test=4)
    for system in (mutual_information().eval(), loaded.system):
        opened = replace(loaded, system=system)
        before = probe(opened, data, ["classification", "retrieval"], epochs=1)
        result = before["classification"].result
        assert isinstance(result, Result)
        assert result.encoder is system.image_encoder
        assert result.head.output.in_features == system.image_encoder.width
        for name, part in system.named_children():
            if name != "image_encoder":
                for parameter in part.parameters():
                    torch.nn.init.normal_(parameter)
        after = probe(opened, data, ["classification", "retrieval"], epochs=1)
        assert after["classification"].scores == before["classification"].scores
        found = [outcomes["retrieval"].result.found for outcomes in (before, after)]
        assert not torch.equal(*found)


def test_fine_tuning_trains_an_encoder_that_rested(run: Path) -> None:
    loaded = Run.load(run)
    data = scene_parts(loaded.transform, train=8, val=4, test=4)
    system = mutual_information(freeze=["image"]).eval()
    state = {name: value.clone() for name, value in system.image_encoder.state_dict().items()}
    outcome = probe(replace(loaded, system=system), data, ["classification"], frozen=False, epochs=1)
    result = outcome["classification"].result
    assert isinstance(result, Result)
    moved = [
        name for name, value in result.encoder.state_dict().items() if not torch.equal(value, state[name])
    ]
    assert any("running_mean" in name for name in moved)
    assert all(torch.equal(value, state[name]) for name, value in system.image_encoder.state_dict().items())


def test_probe_takes_tasks_of_ones_own(run: Path) -> None:
    class Renamed(Classification):
        name = "mine"

    loaded = Run.load(run)
    data: dict[str, ScenePart] = scene_parts(loaded.transform, train=8, val=4, test=4)
    lines: list[str] = []
    outcomes = probe(loaded, data, [Renamed(), "classification"], epochs=1, say=lines.append)
    assert list(outcomes) == ["mine", "classification"] and len(lines) == 2
    assert outcomes["mine"].scores == outcomes["classification"].scores
    assert to_json(outcomes)["mine"]["training"]["epochs"] == 1
    assert to_markdown(outcomes).count("\n") == 2 + 6 - 1
    with pytest.raises(ValueError, match="expected some of classification, .*, got 'all'"):
        probe(loaded, data, "all")
