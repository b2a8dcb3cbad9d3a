"""`jrl segment`: pictures of any size, the datasets' layouts, and its error messages."""

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
from transformers import GroupViTConfig, GroupViTModel

from jrl.cli import main
from jrl.data.images import ImageTransform
from jrl.data.readers import SEGMENTATION_FORMATS, read_voc
from jrl.segmentation.classes import encode_classes, parse_names
from jrl.segmentation.pictures import palette
from jrl.segmentation.segment import Options, largest, pixels_of, segment
from jrl.systems import GroupViT
from jrl.systems.group_vit_transformers import from_transformers
from jrl.training.run import Run
from tests.data.fixtures import write_coco_object, write_pascal
from tests.jrl.group_vit_fixtures import TEXT
from tests.jrl.painter import COLOURS, VOCABULARY, painter_run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """What `jrl segment --run painter` opens."""
    return use(monkeypatch, painter_run(words=["background", "dragon", "cloud"]))


def use(monkeypatch: pytest.MonkeyPatch, run: Run) -> Run:
    monkeypatch.setattr(Run, "load", lambda folder, **_: run)
    return run


def paint(path: Path, width: int, height: int, *, split: float = 0.5) -> Path:
    """Red at the left, blue at the right, white below."""
    pixels = np.full((height, width, 3), COLOURS["white"], np.uint8)
    middle, bottom = round(split * width), round(0.75 * height)
    pixels[:bottom, :middle], pixels[:bottom, middle:] = COLOURS["red"], COLOURS["blue"]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def expected(width: int, height: int) -> np.ndarray:
    """1 where `paint` was red, 2 where it was blue, 0 below."""
    index = np.zeros((height, width), np.uint8)
    index[: round(0.75 * height), : width // 2], index[: round(0.75 * height), width // 2 :] = 1, 2
    return index


def agreement(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask == truth).mean())


def mask_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert np.array_equal(
            np.reshape(picture.getpalette(), (-1, 3)), palette()[: len(picture.getpalette()) // 3]
        )
        return np.array(picture)


def test_pictures_of_any_size_leave_masks_overlays_and_scores(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"square": (64, 64), "[bold]": (20, 20), "wide": (150, 60), "tall": (40, 90), "small": (9, 7)}
    files = [str(paint(tmp_path / f"{name}.png", *size)) for name, size in sizes.items()]
    again = str(paint(tmp_path / "other" / "square.png", 64, 64))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    command = [
        "segment",
        "--run",
        "painter",
        "--classes",
        "red, blue,Background",
        "--out",
        str(out),
        "--stages",
    ]
    assert main([*command, *files, again, str(tmp_path / "broken.png")]) == 0
    said = capsys.readouterr()
    assert "image unreadable: 1" in said.err and "highest" in said.out and "[bold].png" in said.out
    values = json.loads((out / "segment.json").read_text())
    assert values["names"] == ["background", "red", "blue"] and values["background"] == "threshold"
    assert (values["size"], values["threshold"], values["window"], values["mode"]) == (16, 0.95, None, "code")
    names = [*sizes, "square-2"]
    assert [entry["mask"] for entry in values["pictures"]] == [f"{name}.mask.png" for name in names]
    for entry, name in zip(values["pictures"], names, strict=True):
        size = sizes[name.removesuffix("-2")]
        mask = mask_of(out / entry["mask"])
        assert (entry["width"], entry["height"]) == size and mask.shape == size[::-1]
        # borders are as coarse as the patches
        assert agreement(mask, expected(*size)) > (0.9 if name != "small" else 0.5)
        for number, result in enumerate(entry["classes"]):
            assert result["number"] == number and result["name"] == values["names"][number]
            assert result["share"] == pytest.approx((mask == number).mean())
        background, red, blue = entry["classes"]
        assert background["score"] is background["best"] is background["cosine"] is None
        assert 0.95 < red["score"] < red["best"] + 1e-6 < 1 + 2e-6 and blue["cosine"] > 0.3
        for kind in ("overlay", "stages"):
            with Image.open(out / entry[kind]) as picture:
                assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_the_background_is_a_threshold_or_a_text_or_nothing(run: Run, tmp_path: Path) -> None:
    path = str(paint(tmp_path / "a.png", 64, 64))

    def found(*options: str) -> tuple[np.ndarray, dict[str, Any]]:
        assert main(["segment", "--run", "painter", "--out", str(tmp_path / "out"), *options, path]) == 0
        values = json.loads((tmp_path / "out" / "segment.json").read_text())
        return mask_of(tmp_path / "out" / "a.mask.png"), values

    below = slice(52, None)
    mask, values = found("--classes", "red, blue")
    assert values["background"] is None and values["threshold"] is None and mask.min() == 1
    assert [result["number"] for result in values["pictures"][0]["classes"]] == [1, 2]
    mask, values = found("--classes", "red, blue", "--threshold", "0.5")
    assert (
        values["background"] == "threshold"
        and (mask[below] == 0).all()
        and agreement(mask, expected(64, 64)) > 0.9
    )
    # a threshold of 0 lets nothing be background
    assert found("--classes", "red, blue", "--threshold", "0")[0].min() == 1
    # this background is a word that means white
    mask, values = found(
        "--classes", "red, blue, background", "--background", "text", "--template", "a photo of a {}."
    )
    assert (
        values["templates"] == ["a photo of a {}."]
        and values["pictures"][0]["classes"][0]["best"] is not None
    )
    patent, values = found("--classes", "red, blue, white, background", "--mode", "patent")
    assert values["background"] == "text" and values["mode"] == "patent" and (patent[below] == 3).all()
    # with one class left in each picture, the other has no pixels
    mask, values = found("--classes", "red, blue", "--top-k", "1")
    assert len(np.unique(mask)) == 1
    assert [result["share"] for result in values["pictures"][0]["classes"]].count(0.0) == 1
    mask, values = found(
        "--classes", "blue, red, background", "--size", "32", "--window", "16", "--stride", "8"
    )
    assert (values["size"], values["window"], values["stride"]) == (32, 16, 8)
    assert agreement(mask, np.array([0, 2, 1], np.uint8)[expected(64, 64)]) > 0.9


def test_a_picture_is_scored_at_its_own_size(run: Run) -> None:
    system = run.system
    assert isinstance(system, GroupViT)
    # the long side is bounded, so a line of pixels costs no more than a panorama
    assert pixels_of(run, Image.new("RGB", (4000, 1000)), 16).shape == (1, 3, 16, 64)
    assert pixels_of(run, Image.new("RGB", (9000, 3)), 16).shape == (1, 3, 1, 73)
    classes = encode_classes(run, system, ["red", "blue"], "threshold", ["{}"])
    picture = Image.new("RGB", (31, 17), COLOURS["red"])
    found = segment(run, system, picture, classes, Options(16, threshold=0.95))
    assert found.index.shape == (17, 31) and (found.index == 1).all()
    scores = torch.rand(5, 6, 7)
    best, place = largest(scores, (11, 9))
    whole = F.interpolate(scores[None], (11, 9), mode="bilinear", align_corners=False)[0]
    assert torch.equal(place, whole.argmax(dim=0)) and torch.equal(best, whole.amax(dim=0))
    same = largest(scores, (6, 7))
    assert torch.equal(same[1], scores.argmax(dim=0))


@pytest.mark.parametrize(
    ("name", "words"),
    [("voc", ("aeroplane", "bicycle", "monitor")), ("context", ("airplane", "bag", "wood"))],
)
def test_pascal_layouts_are_scored(
    name: str, words: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = write_pascal(tmp_path, name)
    others = SEGMENTATION_FORMATS[name](tmp_path).classes[1:]
    meanings = dict(zip(words, (COLOURS[colour] for colour in ("red", "green", "blue")), strict=True))
    use(monkeypatch, painter_run({**meanings, "white": COLOURS["white"]}, others))
    command = [
        "segment",
        "--run",
        "painter",
        "--dataset",
        name,
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--size", "32"]) == 0
    values = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert values["threshold"] == {"voc": 0.95, "context": 0.35}[name]
    assert values["templates"] == ["a photo of a {}."] and (values["size"], values["window"]) == (32, None)
    assert values["pictures"] == len(masks) == 2 and set(values["class_iou"]) == {"background", *others}
    seen = {key: value for key, value in values["class_iou"].items() if value is not None}
    assert set(seen) >= {"background", *words} and min(seen[word] for word in ("background", *words)) > 0.4
    assert values["mean_iou"] == pytest.approx(sum(seen.values()) / len(seen))
    for key in masks:
        with Image.open(tmp_path / "out" / f"{key}.overlay.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    text = (tmp_path / "out" / "segment.md").read_text()
    assert "| mean IoU |" in text and "| background |" in text and text.count("\n") > len(others)
    # the published windows: twice the side of the training, moved by one side
    assert main([*command, "--limit", "1"]) == 0
    values = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert (values["size"], values["window"], values["stride"], values["pictures"]) == (32, 32, 16, 1)


def test_the_score_is_that_of_the_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against intersection over union counted by hand on the masks that pictures mode writes."""
    write_pascal(tmp_path, "voc")
    data = read_voc(tmp_path)
    meanings = {"aeroplane": COLOURS["red"], "bicycle": COLOURS["green"], "monitor": COLOURS["blue"]}
    use(monkeypatch, painter_run({**meanings, "white": COLOURS["white"]}, data.classes[1:]))
    out = str(tmp_path / "out")
    assert (
        main(["segment", "--run", "painter", "--dataset", "voc", "--root", str(tmp_path), "--out", out]) == 0
    )
    scored = json.loads((tmp_path / "out" / "segment.json").read_text())["class_iou"]
    pictures = [str(sample.image) for sample in data.samples]
    names = ", ".join((*data.classes[1:], "background"))
    options = ["--size", "32", "--window", "32", "--stride", "16", "--template", "a photo of a {}."]
    assert main(["segment", "--run", "painter", "--classes", names, "--out", out, *options, *pictures]) == 0
    intersection, union = np.zeros(21), np.zeros(21)
    for sample in data.samples:
        truth, said = sample.load_mask(), mask_of(tmp_path / "out" / f"{sample.key}.mask.png")
        counted = truth != 255
        for number in range(21):
            is_true, is_said = (truth == number) & counted, (said == number) & counted
            intersection[number] += (is_true & is_said).sum()
            union[number] += (is_true | is_said).sum()
    for number, name in enumerate(data.classes):
        if union[number]:
            assert scored[name] == pytest.approx(intersection[number] / union[number])
        else:
            assert scored[name] is None


def test_coco_layout_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco_object(tmp_path)
    use(
        monkeypatch,
        painter_run({"dog": COLOURS["white"], "red": COLOURS["red"]}, ["person", "toothbrush", "cat"]),
    )
    command = [
        "segment",
        "--run",
        "painter",
        "--dataset",
        "coco",
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    values = json.loads((tmp_path / "out" / "segment.json").read_text())
    # white is dog to this system, so dogs are found everywhere: 53 of 120 + 48 − 7 pixels that count
    dogs = 7 * 8 - 4
    crowd = 3 * 4 - 1
    assert values["class_iou"]["dog"] == pytest.approx(dogs / (120 - crowd + 48))
    assert values["class_iou"]["person"] is None and values["class_iou"]["toothbrush"] == 0.0
    assert main([*command, "--classes", "person, cat, toothbrush"]) == 0
    renamed = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert (
        renamed["names"] == ["background", "person", "cat", "toothbrush"]
        and renamed["class_iou"]["dog"] != values["class_iou"]["dog"]
    )
    assert main([*command, "--classes", "person, cat"]) == 2
    assert "expected other texts for the 3 classes of coco" in capsys.readouterr().err


def test_weights_of_transformers_become_a_run_that_segments(tmp_path: Path) -> None:
    tokenizer = painter_run().tokenizer
    vision = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "depths": [1, 1, 1],
        "num_group_tokens": [6, 3, 0],
        "num_output_groups": [6, 3, 0],
    }
    text = {
        **TEXT,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "eos_token_id": tokenizer.eos_token_id,
    }
    del text["model_type"]
    torch.manual_seed(0)
    theirs = GroupViTModel(GroupViTConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    saved = Run(
        from_transformers(theirs),
        tokenizer,
        ImageTransform(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        32,
    )
    saved.save(tmp_path / "run")
    loaded = Run.load(tmp_path / "run")
    assert (loaded.transform.size, loaded.max_length) == (32, 32)
    assert np.array_equal(loaded.transform.mean, saved.transform.mean)
    assert torch.equal(loaded.encode_texts(["red"]), saved.encode_texts(["red"]))
    picture = str(paint(tmp_path / "pictures" / "a.png", 50, 41))
    assert (
        main(
            [
                "segment",
                "--run",
                str(tmp_path / "run"),
                "--classes",
                "red, blue, background",
                "--stages",
                picture,
            ]
        )
        == 0
    )
    assert {path.name for path in (tmp_path / "run" / "segment").iterdir()} == {
        "segment.json",
        "a.mask.png",
        "a.overlay.png",
        "a.stages.png",
    }
    assert mask_of(tmp_path / "run" / "segment" / "a.mask.png").shape == (41, 50)
    # a folder stands for its pictures
    out = str(tmp_path / "out")
    assert (
        main(
            [
                "segment",
                "--run",
                str(tmp_path / "run"),
                "--classes",
                "red, blue",
                "--out",
                out,
                str(tmp_path / "pictures"),
            ]
        )
        == 0
    )


def test_names_and_colours() -> None:
    assert parse_names(" red  circle,blue ") == ["red circle", "blue"]
    # the first colours of VOC's own masks
    assert palette()[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette()[15].tolist() == [192, 128, 128] and palette()[20].tolist() == [0, 64, 128]
    assert len({tuple(colour) for colour in palette().tolist()}) == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png"], 'classes: expected names separated by commas, such as --classes "red circle'),
        (["--classes", "red, blue"], "image: expected at least one picture, or --dataset"),
        (["--classes", " , ", "a.png"], "classes: expected names"),
        (["--classes", "red,,blue", "a.png"], "expected a name between every two commas"),
        (["--classes", "red, Red", "a.png"], "'Red' occurs twice"),
        (["--classes", "background", "a.png"], "at least one besides the background"),
        (["--classes", "red, background", "a.png"], "no threshold finds the background"),
        (["--classes", "日本, 漢字", "a.png"], "'日本' and '漢字' are the same text"),
        (["--classes", ",".join(f"c{i}" for i in range(255)), "a.png"], "at most 254"),
        (["--classes", "red, blue", "--template", "a photo", "a.png"], "templates: expected '{}'"),
        (["--classes", "red, blue", "gone.png"], "image: gone.png: no such file"),
        (["--classes", "red, blue", "broken.png"], "no usable sample; 1 skipped"),
        (["--classes", "red, blue", "--threshold", "2", "a.png"], "threshold: expected a value in [0, 1]"),
        (["--classes", "red, blue", "--threshold", "0.5", "--mode", "patent", "a.png"], "no threshold"),
        (["--classes", "red, blue", "--background", "text", "--threshold", "0.5", "a.png"], "no meaning"),
        (["--classes", "red, blue", "--top-k", "-1", "a.png"], "top-k"),
        (["--classes", "red, blue", "--window", "0", "a.png"], "window: expected at least 1"),
        (["--classes", "red, blue", "--stride", "4", "a.png"], "stride: has a meaning only with --window"),
        (["--classes", "red, blue", "--split", "val", "a.png"], "split: has a meaning only with --dataset"),
        (["--classes", "red, blue", "--out", "a.png", "a.png"], "out: a.png is a file"),
        (["--dataset", "voc"], "root: expected the folder of the dataset"),
        (["--dataset", "voc", "--root", ".", "a.png"], "dataset: takes neither pictures nor --stages"),
        (["--dataset", "voc", "--root", "."], "ImageSets/Segmentation/val.txt"),
        (["--dataset", "ade20k", "--root", "."], "invalid choice: 'ade20k'"),
    ],
)
def test_errors(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "a.png", 20, 20)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    code: Any
    try:
        code = main(["segment", "--run", "painter", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "painter" / "segment" / "segment.json").exists()


def test_another_system_and_a_mask_of_another_size(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class CLIP(torch.nn.Module):
        pass

    use(monkeypatch, Run(CLIP(), run.tokenizer, run.transform, 32))
    path = str(paint(tmp_path / "a.png", 20, 20))
    assert main(["segment", "--run", "runs/clip", "--classes", "red, blue", path]) == 2
    assert "runs/clip holds a CLIP, and only a GroupViT segments" in capsys.readouterr().err
    write_pascal(tmp_path, "voc")
    use(monkeypatch, painter_run(words=read_voc(tmp_path).classes[1:]))
    Image.new("L", (5, 5)).save(tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "a.png")
    assert (
        main(
            [
                "segment",
                "--run",
                "p",
                "--dataset",
                "voc",
                "--root",
                str(tmp_path),
                "--out",
                str(tmp_path / "o"),
            ]
        )
        == 2
    )
    assert "'a': its mask is [5, 5], its picture [20, 30]" in capsys.readouterr().err
