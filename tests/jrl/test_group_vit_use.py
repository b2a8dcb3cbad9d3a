"""A GroupViT run is searched, embedded and asked for classes like a CLIP; the published recipe takes a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from jrl.cli import main
from jrl.data.images import ImageTransform, load_image
from jrl.data.tokenizer import save_tokenizer, train_tokenizer
from jrl.encoders import TextEncoder
from jrl.encoders.group_vit import GroupViTImageEncoder
from jrl.evaluation import evaluate, zero_shot_accuracy
from jrl.objectives.multi_label import MultiLabelObjective
from jrl.systems import CLIP, GroupViT, load_system
from jrl.systems.zero_shot import ZeroShotSystem
from jrl.training.run import Run, image_files
from tests.data.fixtures import jpeg, write_tar
from tests.jrl.conftest import COLOURS, SHAPES
from tests.jrl.group_vit_fixtures import small_group_vit

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, NAMES = 150, ("input_ids", "attention_mask")
IMAGE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "heads": 2,
    "depths": [1, 1, 1],
    "group_tokens": [8, 4, 0],
    "drop_path": 0.0,
    "init_std": None,
}
TEXT: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the 48 pictures of coloured shapes, as `jrl fit` leaves it."""
    files = image_files(pictures)
    captions = [path.with_suffix(".txt").read_text().strip() for path in files]
    tokenizer = train_tokenizer(captions, vocabulary_size=300, max_length=16)
    transform = ImageTransform(32, (0.5,) * 3, (0.5,) * 3)
    pixels = torch.stack([transform(load_image(path)) for path in files])
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    system = GroupViT(GroupViTImageEncoder(**IMAGE), TextEncoder(TEXT, "eos"), 32, 64).train()
    optimizer = torch.optim.AdamW(system.parameters(), lr=3e-3)
    for step in range(STEPS):
        rows = torch.randperm(48, generator=torch.Generator().manual_seed(step))[:24]
        batch = {
            "pixel_values": pixels[rows],
            **{name: tokens[name][rows] for name in tokens if name in NAMES},
        }
        loss = system(batch)[0]["contrastive"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("group_vit")
    Run(system, tokenizer, transform, 16).save(folder)
    return folder


def test_classes_and_captions_are_found_in_both_directions(run: Path, pictures: Path) -> None:
    loaded = Run.load(run)
    system = loaded.system
    assert isinstance(system, GroupViT)
    files = image_files(pictures)
    images, kept, _ = loaded.encode_images([(path.stem, path) for path in files])
    assert len(kept) == 48
    torch.testing.assert_close(images.norm(dim=1), torch.ones(48))
    captions = [path.with_suffix(".txt").read_text().strip() for path in files]
    found = evaluate(images, loaded.encode_texts(captions), scale=system.objective.scale.item())
    # chance is 1/48 and 10/48
    assert min(found["i2t_r1"], found["t2i_r1"]) > 0.2 and min(found["i2t_r10"], found["t2i_r10"]) > 0.7
    assert 0 < found["bound_nats"] < found["bound_ceiling"]
    for names, part, bar in ((list(COLOURS), 1, 0.6), (list(SHAPES), 2, 0.5)):
        labels = torch.tensor([names.index(path.stem.split("-")[part]) for path in files])
        templates = (
            [f"a large {{}} {shape}" for shape in SHAPES]
            if part == 1
            else [f"a large {colour} {{}}" for colour in COLOURS]
        )
        classifier = system.zero_shot_classifier(names, templates, loaded.tokenizer)
        accuracy = zero_shot_accuracy(images, classifier, labels, ks=(1, 3))
        assert accuracy["top1"] > bar and accuracy["top3"] >= accuracy["top1"]
        pixels = torch.stack([loaded.transform(load_image(path)) for path in files])
        shares, best = system.classify(pixels, classifier, k=2)
        assert float((best[:, 0] == labels).double().mean()) == accuracy["top1"]
        logits = system.objective.scale * images @ classifier.T
        torch.testing.assert_close(shares, logits.softmax(dim=-1).topk(2).values)


def test_retrieve_and_embed(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.png"
    command = [
        "retrieve",
        "--run",
        str(run),
        "--images",
        str(pictures),
        "--k",
        "5",
        "--out",
        str(out),
        "a large red circle",
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.count("red") >= 3
    with Image.open(out) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 5
    path = tmp_path / "embeddings.safetensors"
    assert main(["embed", "--run", str(run), "--images", str(pictures), "--out", str(path)]) == 0
    assert load_file(path)["embeddings"].shape == (48, 32)


def test_classifying_leaves_each_part_in_its_mode() -> None:
    assert issubclass(GroupViT, ZeroShotSystem) and issubclass(CLIP, ZeroShotSystem)
    system = small_group_vit(multi_label=MultiLabelObjective("exclude")).train()
    system.text_encoder.eval()
    system.classify(torch.zeros(2, 3, 16, 16), torch.nn.functional.normalize(torch.randn(3, 16), dim=1))
    assert system.training and system.image_encoder.training and not system.text_encoder.training
    with pytest.raises(ValueError, match="k: expected between 1 and 3"):
        system.classify(torch.zeros(2, 3, 16, 16), torch.zeros(3, 16), k=4)
    with pytest.raises(ValueError, match="classifier"):
        system.classify(torch.zeros(2, 3, 16, 16), torch.zeros(3, 7))


def test_the_published_recipe_takes_steps_at_a_reduced_size(tmp_path: Path) -> None:
    """The config itself, its encoders made small: shards, the augmentations and the schedule are the published ones."""
    members = [
        member
        for number in range(24)
        for member in (
            (f"{number:05}.jpg", jpeg(number, (48, 40))),
            (f"{number:05}.txt", f"a photo of {number}".encode()),
        )
    ]
    write_tar(tmp_path / "00000.tar", members)
    captions = [f"a photo of {number}" for number in range(24)]
    save_tokenizer(train_tokenizer(captions, vocabulary_size=300, max_length=16), tmp_path / "t")
    image = {
        name: IMAGE[name] for name in ("image_size", "patch_size", "width", "heads", "depths", "group_tokens")
    }
    encoders = "--model.system.init_args.{}_encoder.init_args"
    options: dict[str, Any] = {
        "--run": tmp_path / "run",
        "--trainer.accelerator": "cpu",
        "--trainer.devices": 1,
        "--trainer.max_epochs": 5,
        "--trainer.log_every_n_steps": 1,
        "--trainer.enable_progress_bar": "false",
        "--data.options.shards": tmp_path / "00000.tar",
        "--data.tokenizer": tmp_path / "t",
        "--data.image_size": 32,
        "--data.batch_size": 8,
        "--data.workers": 0,
        "--data.val_fraction": 0,
        "--data.val_splits": [],
        "--model.system.init_args.projection_hidden": 64,
        **{f"{encoders.format('image')}.{name}": value for name, value in image.items()},
        f"{encoders.format('text')}.model": {**TEXT, "max_position_embeddings": 77},
    }
    command = [text for name, value in options.items() for text in (name, str(value))]
    assert main(["fit", "--config", str(CONFIGS / "group_vit_published.yaml"), *command]) == 0
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 15
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    fresh = load_system(tmp_path / "run" / "model").from_config(
        {
            k: v
            for k, v in json.loads((tmp_path / "run" / "model" / "config.json").read_text()).items()
            if k != "system"
        }
    )
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    unmoved = [
        name
        for name, weight in fresh.state_dict().items()
        if torch.equal(weights[name], weight) and weight.ndim > 1
    ]
    assert unmoved == []
    (group, without_decay) = last["optimizer_states"][0]["param_groups"]
    assert (group["weight_decay"], without_decay["weight_decay"]) == (0.05, 0.0)
    assert (tuple(group["betas"]), group["eps"], group["initial_lr"]) == ((0.9, 0.999), 1e-8, 1.6e-3)
    # the warm-up of one step of fifteen begins at 4e-6 and the cosine ends at 4e-5
    assert group["lr"] == pytest.approx(4e-5)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["trainer"]["gradient_clip_val"] == 5.0
    assert settings["model"]["warmup_lr_factor"] * 1.6e-3 == pytest.approx(4e-6)
    augment = settings["data"]["augment"]
    assert (augment["scale"], augment["flip"], augment["erase"]) == ([0.08, 1.0], 0.5, 0.25)
    assert augment["rand_augment"] == {
        "operations": 2,
        "magnitude": 9.0,
        "magnitude_std": 0.5,
        "probability": 0.5,
    }
