"""GroupViT beside transformers' own model: the same numbers, and weights that go there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GroupViTConfig, GroupViTModel

from jrl.systems.group_vit_transformers import from_transformers, to_transformers
from tests.jrl.group_vit_fixtures import perturb, small_group_vit

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "depths": [2, 1, 1],
    "num_group_tokens": [6, 3, 0],
    "num_output_groups": [6, 3, 3],
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}


def their_model(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> GroupViTModel:
    torch.manual_seed(0)
    config = GroupViTConfig(
        text_config={**TEXT, **(text or {})},
        vision_config={**VISION, **(vision or {})},
        projection_dim=20,
        projection_intermediate_dim=40,
    )
    model = GroupViTModel(config)
    perturb(model)
    return model.eval()


def inputs(eos: int = 98) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (4, 9))
    ends = torch.tensor([8, 5, 6, 3])
    ids[torch.arange(4), ends] = eos
    mask = (torch.arange(9) <= ends[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 32, 32)}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert theirs.std() > 1e-2  # nothing is equal because it is trivial
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        ({}, {}),
        # the id 2 stands for the largest id there, as in CLIP's first checkpoints
        ({"eos_token_id": 2}, {"assign_eps": 0.25, "hidden_act": "relu", "assign_mlp_ratio": [0.3, 2.2]}),
        (
            {"hidden_act": "gelu"},
            {"depths": [2, 2], "num_group_tokens": [5, 4], "num_output_groups": [5, 3]},
        ),
    ],
)
@torch.no_grad()
def test_same_numbers(text: dict[str, Any], vision: dict[str, Any]) -> None:
    theirs = their_model(text, vision)
    ours = from_transformers(theirs)
    given = inputs()
    wanted = theirs(**given, output_segmentation=True)
    image, words = (
        ours.encode_image(given["pixel_values"]),
        ours.encode_text(given["input_ids"], given["attention_mask"]),
    )
    close(image.global_, wanted.image_embeds)
    close(image.tokens, wanted.vision_model_output.last_hidden_state)
    close(words.global_, wanted.text_embeds)
    maps = ours.group_maps(given["pixel_values"])
    for found, expected in zip(maps.soft, wanted.vision_model_output.attentions, strict=True):
        close(found.mT, expected)
    options: dict[str, Any] = {"pixel_values": given["pixel_values"], "classes": words.global_}
    squared = ours.segmentation_logits(**options, squared_scale=True)
    close(squared, wanted.segmentation_logits)
    once = ours.segmentation_logits(**options)
    close(once * theirs.logit_scale.exp(), wanted.segmentation_logits)


def test_same_loss_and_gradients_in_training_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = their_model()
    ours = from_transformers(theirs)
    given = {name: value[:3] for name, value in inputs().items()}
    # in evaluation neither draws noise, but the batch norms of the projections learn as in training
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.train()
    wanted = theirs(**given, return_loss=True).loss
    losses, _ = ours(given)
    assert losses["contrastive"].item() == pytest.approx(wanted.item(), abs=1e-4)
    losses["contrastive"].backward()
    wanted.backward()
    pairs = (
        (ours.image_encoder.patch_embedding, theirs.vision_model.embeddings.patch_embeddings.projection),
        (
            ours.image_encoder.stages[0].grouping.assign.q_proj,
            theirs.vision_model.encoder.stages[0].downsample.assign.q_proj,
        ),
        (
            ours.image_encoder.stages[1].projector[1].fc1,
            theirs.vision_model.encoder.stages[1].group_projector[1].fc1,
        ),
        (ours.text_projection[3], theirs.text_projection[3]),
    )
    for own, other in pairs:
        scale = other.weight.grad.abs().max().item()
        assert scale > 1e-6
        torch.testing.assert_close(own.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-4 * scale)
    assert ours.objective.log_scale.grad.item() == pytest.approx(theirs.logit_scale.grad.item(), abs=1e-4)


@pytest.mark.parametrize("vision", [{}, {"assign_mlp_ratio": [17 / 48, 29 / 48]}])
def test_weights_and_config_come_back_exactly(vision: dict[str, Any], tmp_path: Any) -> None:
    theirs = their_model(vision=vision)
    again = to_transformers(from_transformers(theirs))
    assert not again.training
    wanted = theirs.state_dict()
    assert set(again.state_dict()) == set(wanted)
    for name, value in again.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    again.save_pretrained(tmp_path)
    read: Any = GroupViTModel.from_pretrained(tmp_path, output_loading_info=True)
    loaded, report = read
    assert not report["missing_keys"] and not report["unexpected_keys"]
    given = inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits_per_image, theirs(**given).logits_per_image)


def test_a_system_of_our_own_goes_there_too() -> None:
    ours = small_group_vit().eval()
    perturb(ours)
    theirs = to_transformers(ours)
    pixels = torch.randn(2, 3, 16, 16)
    ids = torch.tensor([[1, 10, 20, 3, 0], [1, 11, 3, 0, 0]])
    with torch.no_grad():
        wanted = theirs(pixel_values=pixels, input_ids=ids, attention_mask=(ids > 0).long())
        close(ours.encode_image(pixels).global_, wanted.image_embeds)
        close(ours.encode_text(ids, ids > 0).global_, wanted.text_embeds)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: from_transformers(small_group_vit()), TypeError, "GroupViTModel"),
        (lambda: to_transformers(their_model()), TypeError, "expected GroupViT"),
        (lambda: from_transformers(their_model(vision={"dropout": 0.1})), ValueError, "dropout"),
        (lambda: from_transformers(their_model(vision={"patch_size": [8, 8]})), ValueError, "patch_size"),
        (lambda: to_transformers(small_group_vit(image={"assign_scale": 1.0})), ValueError, "assign_scale"),
        (lambda: to_transformers(small_group_vit(image={"hard": False})), ValueError, "hard"),
        (lambda: to_transformers(small_group_vit(image={"tau": 2.0})), ValueError, "tau"),
        (
            lambda: to_transformers(small_group_vit(image={"output_groups": (5, 3, 0)})),
            ValueError,
            "as many groups",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()
