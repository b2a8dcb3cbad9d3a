"""CLIP: the same numbers as transformers, learning, saving, loading and its refusals."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from jrl.encoders import ImageEncoder, TextEncoder
from jrl.objectives import ContrastiveObjective
from jrl.systems import CLIP, load_system
from jrl.systems import base as base_module

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT: dict[str, Any] = {"model_type": "vit", "image_size": 16, "patch_size": 8, **SMALL}
BERT: dict[str, Any] = {"model_type": "bert", "vocab_size": 40, "max_position_embeddings": 16, **SMALL}


def small_clip(**options: Any) -> CLIP:
    torch.manual_seed(0)
    return CLIP(ImageEncoder(VIT, "mean"), TextEncoder(BERT, "mean"), projection_dim=16, **options)


def colour_batch(rows: int, seed: int) -> dict[str, Tensor]:
    """Pictures of one of 12 colours at one of 4 brightnesses, and the two words that name them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(48, generator=generator)[:rows]
    colour, shade = order // 4, order % 4
    angle = colour * (2 * math.pi / 12)
    hue = torch.stack([angle.cos(), (angle - 2).cos(), (angle + 2).cos()], dim=1)
    pixels = (hue * (0.3 + 0.3 * shade[:, None]))[:, :, None, None].expand(rows, 3, 16, 16)
    noise = 0.05 * torch.randn(rows, 3, 16, 16, generator=generator)
    ids = torch.stack([torch.full((rows,), 2), 4 + colour, 20 + shade, torch.full((rows,), 3)], dim=1)
    return {"pixel_values": pixels + noise, "input_ids": ids, "attention_mask": torch.ones(rows, 4)}


def steps(backend: str, count: int) -> tuple[CLIP, list[float]]:
    system = small_clip(objective=ContrastiveObjective(backend=backend)).train()
    optimizer = torch.optim.AdamW(system.parameters(), lr=2e-3, weight_decay=0.0)
    losses = []
    for step in range(count):
        torch.manual_seed(step)
        values, _ = system(colour_batch(32, step))
        loss = values["contrastive"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return system, losses


def test_same_numbers_as_transformers() -> None:
    config = CLIPConfig(
        text_config={**SMALL, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    theirs = CLIPModel(config).eval()
    ours = CLIP(
        ImageEncoder(config.vision_config, "pooler"), TextEncoder(config.text_config, "pooler"), 24
    ).eval()
    names = {
        "vision_model.": "image_encoder.model.",
        "text_model.": "text_encoder.model.",
        "visual_projection.": "image_projection.output.",
        "text_projection.": "text_projection.output.",
        "logit_scale": "objective.log_scale",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        old = next(prefix for prefix in names if key.startswith(prefix))
        state[names[old] + key[len(old) :]] = value
    ours.load_state_dict(state)
    pixels = torch.randn(5, 3, 32, 32)
    ids = torch.randint(3, 97, (5, 9))
    ids[torch.arange(5), torch.tensor([8, 7, 6, 5, 4])] = 98
    mask = (torch.arange(9) <= torch.tensor([8, 7, 6, 5, 4])[:, None]).long()
    expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=mask, return_loss=True)
    assert torch.allclose(ours.encode_image(pixels).global_, expected.image_embeds, atol=1e-5)
    assert torch.allclose(ours.encode_text(ids, mask).global_, expected.text_embeds, atol=1e-5)
    losses, _ = ours({"pixel_values": pixels, "input_ids": ids, "attention_mask": mask})
    assert losses["contrastive"].item() == pytest.approx(expected.loss.item(), abs=2e-5)
    losses["contrastive"].backward()
    theirs.zero_grad()
    expected.loss.backward()
    assert ours.objective.log_scale.grad is not None
    assert ours.objective.log_scale.grad.item() == pytest.approx(theirs.logit_scale.grad.item(), abs=1e-4)
    theirs_gradient = theirs.vision_model.embeddings.patch_embedding.weight.grad
    ours_gradient = ours.image_encoder.model.embeddings.patch_embedding.weight.grad
    assert torch.allclose(ours_gradient, theirs_gradient, atol=1e-5)


def test_learns_colours_past_ninety_percent() -> None:
    system, losses = steps("auto", 250)
    system.eval()
    batch = colour_batch(48, 999)
    with torch.no_grad():
        image = system.encode_image(batch["pixel_values"]).global_
        text = system.encode_text(batch["input_ids"], batch["attention_mask"]).global_
    right = ((image @ text.T).argmax(dim=1) == torch.arange(48)).float().mean()
    assert losses[0] == pytest.approx(math.log(32), rel=0.5)
    assert right > 0.9  # chance is 1/48


def test_kernels_and_reference_take_the_same_twenty_steps() -> None:
    fused, fused_losses = steps("auto", 20)
    plain, plain_losses = steps("reference", 20)
    assert fused_losses == pytest.approx(plain_losses, rel=2e-4)
    for (name, ours), theirs in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3), name


def test_encodings_are_unit_vectors_with_tokens() -> None:
    system = small_clip().eval()
    batch = colour_batch(5, 0)
    image, text = (
        system.encode_image(batch["pixel_values"]),
        system.encode_text(batch["input_ids"], batch["attention_mask"]),
    )
    assert image.tokens.shape == (5, 5, 32)
    assert text.tokens.shape == (5, 4, 32)
    assert image.mask is None
    assert text.mask is not None
    for vectors in (image.global_, text.global_):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(5), atol=1e-6)


@pytest.mark.parametrize("role", ["negative", "exclude", "positive"])
def test_duplicate_captions_play_their_role(role: str) -> None:
    system = small_clip(duplicate_captions=role).eval()
    batch = colour_batch(6, 0)
    batch["input_ids"][1] = batch["input_ids"][0]
    image, text = (
        system.encode_image(batch["pixel_values"]).global_,
        system.encode_text(batch["input_ids"]).global_,
    )
    logits = (system.objective.scale * image @ text.T).detach()
    same = torch.eye(6, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    if role == "exclude":
        logits = logits.masked_fill(same & ~torch.eye(6, dtype=torch.bool), float("-inf"))
    target = (same.float() / same.sum(dim=1, keepdim=True)) if role == "positive" else torch.eye(6)
    expected = (
        F.cross_entropy(logits, target) if role == "positive" else F.cross_entropy(logits, torch.arange(6))
    ) / 2
    expected += (
        F.cross_entropy(logits.T, target)
        if role == "positive"
        else F.cross_entropy(logits.T, torch.arange(6))
    ) / 2
    assert system(batch)[0]["contrastive"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_batch_options_reach_the_objective() -> None:
    system = small_clip().eval()
    batch: dict[str, Any] = dict(colour_batch(4, 0))
    base = system(batch)[0]["contrastive"].item()
    two = {**batch, "positives": torch.tensor([0, 0, 1, 1])}
    assert system(two)[0]["contrastive"].item() != pytest.approx(base)
    queue = {**batch, "negatives": F.normalize(torch.randn(9, 16), dim=-1)}
    assert system(queue)[0]["contrastive"].item() > base
    with pytest.raises(ValueError, match="positives"):
        small_clip(duplicate_captions="positive").eval()(two)
    with pytest.raises(ValueError, match="the same number of rows without positives, got 3 and 4"):
        system({**batch, "pixel_values": batch["pixel_values"][:3]})


class Words:
    """A tokenizer of single words for the tests."""

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Tensor]:
        rows = [[4 + sum(map(ord, word)) % 36 for word in text.split()] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_zero_shot_classifier_averages_its_prompts() -> None:
    system = small_clip().train()
    names, templates = ["red cat", "dog", "green bird"], ["a {}", "the photo of a {}"]
    classifier = system.zero_shot_classifier(names, templates, Words())
    assert system.training
    system.eval()
    expected = []
    for name in names:
        encoded = [
            system.encode_text(**Words()([template.format(name)])).global_[0] for template in templates
        ]
        expected.append(F.normalize(torch.stack(encoded).mean(dim=0), dim=-1))
    assert torch.allclose(classifier, torch.stack(expected), atol=1e-5)
    assert torch.allclose(classifier.norm(dim=1), torch.ones(3), atol=1e-6)


def test_classify_ranks_by_cosine() -> None:
    system = small_clip().eval()
    pixels = colour_batch(4, 0)["pixel_values"]
    image = system.encode_image(pixels).global_.detach()
    classifier = torch.stack([image[2], image[0], -image[0]])
    probabilities, classes = system.classify(pixels, classifier, k=3)
    assert torch.equal(classes, (image @ classifier.T).argsort(dim=1, descending=True))
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(4), atol=1e-5)
    assert system.classify(pixels, classifier)[1].shape == (4, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projection": "mlp", "projection_hidden": 24, "duplicate_captions": "exclude"},
        {"projection": "mlp_bn", "objective": ContrastiveObjective("sigmoid")},
    ],
)
def test_saves_and_loads_the_same_system(tmp_path: Path, options: dict[str, Any]) -> None:
    system = small_clip(**options).eval()
    system.save_pretrained(tmp_path / "model")
    assert {"config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "model").iterdir()}
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert len({file.stat().st_mode for file in (tmp_path / "model").iterdir()}) == 1
    for loaded in (CLIP.from_pretrained(tmp_path / "model"), load_system(tmp_path / "model")):
        assert isinstance(loaded, CLIP)
        assert not loaded.training
        assert loaded.to_config() == system.to_config()
        for name, value in system.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        batch = colour_batch(4, 0)
        assert loaded(batch)[0]["contrastive"].item() == system(batch)[0]["contrastive"].item()
    system.save_pretrained(tmp_path / "model")
    assert CLIP.from_pretrained(tmp_path / "model").to_config() == system.to_config()


def test_a_failed_save_leaves_the_old_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = small_clip().eval()
    system.save_pretrained(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}

    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with torch.no_grad():
        system.image_projection.output.weight.zero_()
    monkeypatch.setattr(base_module.os, "replace", full)
    with pytest.raises(OSError, match=r"model: the system could not be saved.*No space"):
        system.save_pretrained(tmp_path / "model")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_an_encoder_without_config_cannot_be_saved(tmp_path: Path) -> None:
    system = small_clip()
    system.image_encoder.model = torch.nn.Identity()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="Identity has no transformers config"):
        system.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_folders_say_why(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CLIP.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_system(tmp_path)
    small_clip().save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: unreadable or truncated"):
        CLIP.from_pretrained(folder)
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match="unreadable"):
        CLIP.from_pretrained(folder)
    weights.write_bytes(whole)

    config.write_text(text[:50])
    with pytest.raises(ValueError, match="not a JSON config"):
        CLIP.from_pretrained(folder)
    with pytest.raises(ValueError, match="not the config of a system"):
        load_system(folder)
    config.write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ValueError, match="expected the config of a CLIP"):
        CLIP.from_pretrained(folder)
    config.write_text(json.dumps({"system": "Os"}))
    with pytest.raises(ValueError, match="no system is called 'Os'"):
        load_system(folder)
    values = json.loads(text)
    config.write_text(json.dumps({**values, "projection_dim": 17}))
    with pytest.raises(
        ValueError, match=r"image_projection.output.weight is \[16, 32\], expected \[17, 32\]"
    ):
        CLIP.from_pretrained(folder)
    values.pop("text_encoder")
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="text_encoder"):
        CLIP.from_pretrained(folder)


def test_missing_and_unknown_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    small_clip().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["extra"] = state.pop("objective.log_scale")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="objective.log_scale is missing; extra is unknown"):
        CLIP.from_pretrained(tmp_path)
    assert isinstance(CLIP.from_pretrained(tmp_path, strict=False), CLIP)


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_pickled_weights_only_when_asked_and_never_code(tmp_path: Path) -> None:
    system = small_clip().eval()
    system.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        CLIP.from_pretrained(tmp_path / "model")
    pickled = tmp_path / "model" / "pytorch_model.bin"
    torch.save(system.state_dict(), pickled)
    with pytest.raises(ValueError, match="allow_pickle=True"):
        CLIP.from_pretrained(tmp_path / "model")
    loaded = CLIP.from_pretrained(tmp_path / "model", allow_pickle=True)
    assert torch.equal(loaded.image_projection.output.weight, system.image_projection.output.weight)
    torch.save(Payload(str(tmp_path / "ran")), pickled)
    with pytest.raises(ValueError, match="unreadable weights"):
        CLIP.from_pretrained(tmp_path / "model", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: CLIP(torch.nn.Identity(), TextEncoder(BERT)), TypeError, "image_encoder"),
        (lambda: CLIP(ImageEncoder(VIT), ImageEncoder(VIT)), TypeError, "text_encoder"),
        (lambda: small_clip(duplicate_captions="maybe"), ValueError, "duplicate_captions"),
        (lambda: small_clip(projection="conv"), ValueError, "kind"),
        (lambda: CLIP(ImageEncoder(VIT), TextEncoder(BERT), 0), ValueError, "out_features"),
        (
            lambda: small_clip(duplicate_captions="exclude", objective=ContrastiveObjective("sigmoid")),
            ValueError,
            "sigmoid",
        ),
        (lambda: small_clip().zero_shot_classifier([], ["a {}"], Words()), ValueError, "class_names"),
        (lambda: small_clip().zero_shot_classifier(["cat"], [], Words()), ValueError, "templates"),
        (lambda: small_clip().zero_shot_classifier(["cat"], ["a photo"], Words()), ValueError, "templates"),
        (
            lambda: small_clip().classify(torch.zeros(1, 3, 16, 16), torch.zeros(3, 7)),
            ValueError,
            "classifier",
        ),
        (lambda: small_clip().classify(torch.zeros(1, 3, 16, 16), torch.zeros(3, 16), 4), ValueError, "k: "),
        (lambda: small_clip()({"pixel_values": torch.zeros(1, 3, 16, 16)}), KeyError, "input_ids"),
    ],
)
def test_bad_input(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()
