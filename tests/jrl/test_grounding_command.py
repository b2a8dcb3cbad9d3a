"""`jrl ground` from a saved run to its table and pictures, and its error messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import jrl.systems.clip
from jrl.cli import main
from jrl.data.scenes import read_scenes
from jrl.data.scenes_drawing import COLOURS
from jrl.data.tokenizer import save_tokenizer, train_tokenizer
from jrl.encoders import EncoderOutput, ImageEncoder, TextEncoder, WordRegions
from jrl.grounding.evaluate import CELL, CENTRE, METRICS, SYSTEM, TWIN, UNIFORM
from jrl.grounding.pictures import Panel, Strip, save_strips
from jrl.systems import CLIP, System


class ColourPointer(System):
    """Knows a colour for some tokens, and looks where the cells of the picture are most like it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.colours = torch.nn.Parameter(torch.rand(vocabulary, 3))
        self.sharpness = torch.nn.Parameter(torch.rand(vocabulary))

    def word_regions(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> WordRegions:
        cells = F.avg_pool2d(pixel_values / 2 + 0.5, pixel_values.shape[-1] // 8).flatten(2).transpose(1, 2)
        distance = (self.colours[input_ids][:, :, None] - cells[:, None]).norm(dim=-1)
        logits = -self.sharpness[input_ids][..., None] * distance
        return WordRegions(logits.softmax(dim=-1), (8, 8), attention_mask.bool())

    def to_config(self) -> dict[str, Any]:
        return {"vocabulary": len(self.colours)}

    @classmethod
    def _assemble(cls, config: dict[str, Any]) -> ColourPointer:
        return cls(**config)

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        raise NotImplementedError

    def encode_image(self, pixel_values: Tensor) -> EncoderOutput:
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        raise NotImplementedError


def save_run(folder: Path, system: System, tokenizer: Any) -> Path:
    system.save_pretrained(folder / "model")
    save_tokenizer(tokenizer, folder / "model" / "tokenizer")
    values = {"image_size": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "max_length": 48}
    (folder / "model" / "preprocessing.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    samples = read_scenes(train=60, val=0, test=0, test_compositional=0, held_out=0, languages=["en"])
    captions = [caption for sample in samples for caption in sample.captions]
    return train_tokenizer(captions, vocabulary_size=500, max_length=48)


@pytest.fixture(scope="module")
def run(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    system = ColourPointer(500)
    with torch.no_grad():
        system.sharpness.zero_()
        for name, colour in COLOURS.items():
            (token,) = tokenizer(f"a {name}", add_special_tokens=False)["input_ids"][1:]
            system.colours[token] = torch.tensor(colour) / 255
            system.sharpness[token] = 12.0
    return save_run(tmp_path_factory.mktemp("run"), system, tokenizer)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Run.load` looks for the class of a saved system in the modules of jrl.systems."""
    monkeypatch.setattr(jrl.systems.clip, "ColourPointer", ColourPointer, raising=False)


def colours_of(path: Path) -> int:
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(maxcolors=1 << 24))


def test_scenes_leave_a_table_and_pictures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["ground", "--run", str(run), "--scenes", "24", "--max-objects", "2", "--against-random"]
    assert main([*command, "--out", str(out), "--seed", "3"]) == 0
    said = capsys.readouterr()
    assert "times as often as the best pointer" in said.out and "captions" in said.err
    assert {path.name for path in out.iterdir()} == {"ground.json", "ground.md", "ground.png"}
    values = json.loads((out / "ground.json").read_text())
    assert (values["system"], values["scenes"], values["grid"]) == ("ColourPointer", 24, [8, 8])
    assert list(values["scores"]) == [SYSTEM, TWIN, CELL, CENTRE, UNIFORM]
    for scores in values["scores"].values():
        assert list(scores) == list(METRICS) and all(0 <= value <= 1 for value in scores.values())
        assert scores["r1_max"] <= scores["r5_max"] <= scores["r10_max"]
        assert scores["r1_mean"] <= scores["r5_mean"] <= scores["r10_mean"]
    # one who knows colours finds most things; random ones point at whatever stands out, and at much else
    assert values["scores"][SYSTEM]["pointing"] > 0.7
    assert values["pointing_times_best_constant"] > 2
    assert values["scores"][SYSTEM]["pointing"] > values["scores"][TWIN]["pointing"]
    assert values["scores"][SYSTEM]["inside"] > 2 * values["scores"][TWIN]["inside"]
    assert values["scores"][SYSTEM]["r5_mean"] > 2 * values["scores"][CELL]["r5_mean"]
    assert values["phrases"] > 40 and 138 < values["candidates"] <= 140
    assert (out / "ground.md").read_text().startswith("| | pointing | inside | R@1 max |")
    assert colours_of(out / "ground.png") > 500
    # without --out the results lie in the run; the same command gives the same bits
    again = ["ground", "--run", str(run), "--scenes", "8", "--seed", "4"]
    found = []
    for _ in range(2):
        assert main(again) == 0
        found.append((run / "ground" / "ground.json").read_bytes())
    assert found[0] == found[1]
    assert list(json.loads(found[0])["scores"]) == [SYSTEM, CELL, CENTRE, UNIFORM]


def scene_picture(path: Path) -> None:
    """Red at the left, blue at the right of what a system sees of a wide picture."""
    pixels = np.full((64, 96, 3), 255, np.uint8)
    pixels[24:40, 24:40] = COLOURS["red"]
    pixels[24:40, 56:72] = COLOURS["blue"]
    Image.fromarray(pixels).save(path)


def test_the_words_of_a_picture_of_the_user(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene_picture(tmp_path / "mine.png")
    command = [
        "ground",
        "--run",
        str(run),
        "--image",
        str(tmp_path / "mine.png"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--caption", "a red circle left of a blue square"]) == 0
    said = capsys.readouterr().out
    rows = dict(re.findall(r"│ (\w+) +│ (.+?) +│ [\d.]+ % +│", said))
    assert rows["circle"].endswith("and 61 more")
    for word, (low, high) in (("red", (24, 40)), ("blue", (56, 72))):
        points = re.findall(r"(\d+), (\d+)", rows[word])
        assert points
        for x, y in points:
            assert low <= int(x) <= high and 24 <= int(y) <= 40
    assert (tmp_path / "out" / "mine.png").is_file() and colours_of(tmp_path / "out" / "mine.png") > 200


def test_captions_and_pictures_of_any_kind_are_drawn(tmp_path: Path) -> None:
    """Dollars, a word longer than its panel, more words than a line holds, and pictures of any shape and size."""
    panels = tuple(Panel(title, torch.rand(4, 3)) for title in ("$", "$5^{", "x" * 60, *"abcdef"))
    flat = Panel("alike", torch.full((2, 2), 0.25), ((0.0, 0.0, 5.0, 90.0),))
    strips = [
        Strip("one $ and $x^ and " + "long " * 40, Image.new("RGB", (30, 20), "red"), panels),
        Strip("", Image.new("L", (3, 900)), (flat,)),
        Strip("a", Image.new("RGB", (3000, 40), "blue"), ()),
    ]
    save_strips(strips, tmp_path / "new" / "out.png")
    with Image.open(tmp_path / "new" / "out.png") as picture:
        assert 1200 < picture.width < 1600 and 800 < picture.height < 2000
    assert colours_of(tmp_path / "new" / "out.png") > 1000


def test_a_file_of_phrases(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene_picture(tmp_path / "mine.png")
    caption = "a red square and a blue square"
    entry = {
        "image": "mine.png",
        "caption": caption,
        "phrases": [
            {"start": 0, "end": 12, "boxes": [[24, 24, 40, 40]]},
            {"start": 17, "end": 30, "boxes": [[56, 24, 72, 40]]},
            {"start": 13, "end": 16, "boxes": []},
        ],
    }
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(entry) + "\n")
    out = tmp_path / "out"
    assert main(["ground", "--run", str(run), "--entities", str(path), "--out", str(out)]) == 0
    assert "phrase without a box: 1" in capsys.readouterr().err
    values = json.loads((out / "ground.json").read_text())
    assert (values["phrases"], values["captions"], values["candidates"]) == (2, 1, 140)
    assert values["scores"][SYSTEM]["pointing"] == 1 and values["scores"][SYSTEM]["r5_mean"] == 1
    # fitted on these very phrases, the constant cell finds one of the two
    assert values["scores"][CELL]["pointing"] == 0.5
    assert values["noted"] == {"phrase without a box": 1} and values["entities"] == str(path)
    path.write_text(json.dumps(entry) + "\n" + json.dumps({**entry, "image": "absent.png"}))
    line = error(["--run", str(run), "--entities", str(path), "--out", str(tmp_path / "new")], capsys)
    assert f"{path}:2: " in line and "absent.png" in line and "no such file" in line
    assert not (tmp_path / "new").exists()


def test_a_clip_grounds_by_its_projected_tokens_or_is_refused(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    for pooling in ("mean", "cls"):
        system = CLIP(
            ImageEncoder({"model_type": "vit", "image_size": 64, "patch_size": 16, **small}, pooling),
            TextEncoder({"model_type": "bert", "vocab_size": 500, "max_position_embeddings": 64, **small}),
            projection_dim=16,
        )
        save_run(tmp_path / pooling, system, tokenizer)
    assert main(["ground", "--run", str(tmp_path / "mean"), "--scenes", "8"]) == 0
    values = json.loads((tmp_path / "mean" / "ground" / "ground.json").read_text())
    assert values["system"] == "CLIP" and values["grid"] == [4, 4]
    line = error(["--run", str(tmp_path / "cls"), "--scenes", "8"], capsys)
    assert "only a CLIP with pooling 'mean' on both sides" in line
    assert not (tmp_path / "cls" / "ground").exists()


def error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["ground", *arguments]) == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    line = captured.strip().splitlines()[-1]
    assert line.startswith("jrl: error: ")
    return line


def test_errors_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene_picture(tmp_path / "mine.png")
    here = ["--run", str(run), "--out", str(tmp_path / "out")]
    image = [*here, "--image", str(tmp_path / "mine.png")]
    absent = [*here, "--image", str(tmp_path / "absent.png")]
    assert "absent: no such run" in error(["--run", str(tmp_path / "absent")], capsys)
    assert "image, caption: expected both or neither" in error(image, capsys)
    assert "image, caption: expected both or neither" in error([*here, "--caption", "a"], capsys)
    assert "caption: expected words, got a blank text" in error([*image, "--caption", " "], capsys)
    assert "absent.png" in error([*absent, "--caption", "a star"], capsys)
    assert "image, entities: choose one" in error([*image, "--caption", "a", "--entities", "b"], capsys)
    assert "absent.jsonl: no such file" in error(
        [*here, "--entities", str(tmp_path / "absent.jsonl")], capsys
    )
    assert "scenes: expected at least 8, got 4" in error([*here, "--scenes", "4"], capsys)
    assert "max_objects: expected 1 to 4, got 5" in error([*here, "--max-objects", "5"], capsys)
    assert "seed: expected 0 or more, got -1" in error([*here, "--seed", "-1"], capsys)
    (tmp_path / "file").write_text("")
    assert "is a file" in error(["--run", str(run), "--out", str(tmp_path / "file")], capsys)
    assert not (tmp_path / "out").exists()
    assert main(["--help"]) == 0
    assert "jrl ground --run RUN" in capsys.readouterr().out
