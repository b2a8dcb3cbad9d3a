"""Files whose parts are named: a run on COCO's layout is judged on pictures that it did not train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from jrl.cli import main
from jrl.data.readers import read
from jrl.generation import SceneClassifier, run_pairs

from .conftest import COLOURS, SHAPES, draw
from .generation_fixtures import generating_run, save_run
from .xmc_gan_fixtures import BERT


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of COCO's reader: 24 pictures to train on, and 5 others with two captions each."""
    root = tmp_path_factory.mktemp("coco")
    both = [(f"{colour}-{shape}", draw(colour, shape, 2)) for colour in COLOURS for shape in SHAPES]
    for part, count in (("train2014", 24), ("val2014", 5)):
        (root / part).mkdir()
        images, annotations = [], []
        for number, (name, picture) in enumerate(both[:count]):
            file = f"COCO_{part}_{number:012d}.jpg"
            wide = Image.new("RGB", (48, 32), "white")
            wide.paste(picture, (8, 0))
            wide.save(root / part / file)
            images.append({"id": number, "file_name": file, "width": 48, "height": 32})
            for place, words in enumerate(("a large", "there is a")):
                caption = f"{words} {name.replace('-', ' ')}"
                annotations.append({"id": 2 * number + place, "image_id": number, "caption": caption})
        document = {"images": images, "annotations": annotations}
        (root / f"captions_{part}.json").write_text(json.dumps(document))
    return {
        "annotations": {part: str(root / f"captions_{part}2014.json") for part in ("train", "val")},
        "images": {part: str(root / f"{part}2014") for part in ("train", "val")},
    }


def test_parts_of_files(coco: dict[str, Any]) -> None:
    samples = read("coco", **coco)
    assert samples.splits == {"train": 24, "val": 5}
    assert samples.select("val")[0].key == "COCO_val2014_000000000000.jpg"
    for options, message in (
        ({"annotations": {}}, "annotations: expected a file for each part, got none"),
        ({"images": {"train": "x"}}, "images: expected the parts of annotations, train, val, got train"),
        ({"split": "dev"}, "split: expected none beside the parts train, val, got 'dev'"),
    ):
        with pytest.raises(ValueError, match=message):
            read("coco", **{**coco, **options})
    twice = {kind: dict.fromkeys(("train", "val"), files["train"]) for kind, files in coco.items()}
    with pytest.raises(ValueError, match="occurs twice"):
        read("coco", **twice)


def test_a_run_is_judged_on_the_other_part(
    coco: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, judge = tmp_path / "run", tmp_path / "classifier"
    sizes = {"image_size": 32, "text_dim": 16, "width": 4}
    parts = {
        "generator": {
            "class_path": "jrl.systems.xmc_gan.Generator",
            "init_args": {**sizes, "noise_dim": 6, "condition_dim": 5},
        },
        "discriminator": {"class_path": "jrl.systems.xmc_gan.Discriminator", "init_args": sizes},
        "text_encoder": {"class_path": "jrl.encoders.TextEncoder", "init_args": {"model": BERT}},
        "sentence_pooling": "mean",
    }
    # the published configuration, made small
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / "xmc_gan_coco.yaml").read_text())
    config["run"] = str(run)
    config["trainer"] |= {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False,
        "callbacks": [{"class_path": "jrl.training.DrawSamples", "init_args": {"every": 3, "count": 1}}],
    }  # fmt: skip
    config["model"]["system"]["init_args"] = parts
    config["data"] |= {"options": coco, "image_size": 32, "batch_size": 8, "vocab_size": 300, "workers": 0}
    given = tmp_path / "given.yaml"
    given.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(given)]) == 0
    assert (run / "samples" / "batch-0000003.png").is_file()
    SceneClassifier(32, 2).eval().save(judge)
    report = [
        "generation-report",
        "--run",
        str(run),
        "--features",
        str(judge),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*report, "--part", "val", "--samples", "12"]) == 0
    assert (
        "val holds 5 pictures: they come again for 12 samples of 10 different texts"
        in capsys.readouterr().err
    )
    values = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert values["distinct"] == {"pictures": 5, "texts": 10}
    assert values["scores"][str(run)]["pictures"] == 12


def test_pictures_come_again_with_their_other_captions(coco: dict[str, Any], tmp_path: Path) -> None:
    run = save_run(tmp_path, generating_run(), dataset="coco", options=coco)
    once, others = run_pairs(run, 2, part="val")
    assert len(others) == 2 and not {pair.name for pair in once} & {pair.name for pair in others}
    many, none = run_pairs(run, 13, part="val")
    assert none == [] and many[:2] == once
    assert [pair.name for pair in many] == [many[place % 5].name for place in range(13)]
    # both captions of every picture before any comes again
    assert len({pair.text for pair in many[:10]}) == 10
    assert [pair.text for pair in many[10:]] == [pair.text for pair in many[:3]]
