"""Encoders around transformers models: shapes, pooling, configs, folders and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, CLIPVisionConfig, ResNetConfig, ViTConfig, ViTModel

from jrl.encoders import ImageEncoder, ProjectionHead, TextEncoder
from jrl.systems import CLIP

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VIT: dict[str, Any] = {"model_type": "vit", "image_size": 32, "patch_size": 8, **SMALL}
RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
CONVNEXT: dict[str, Any] = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
BERT: dict[str, Any] = {"model_type": "bert", "vocab_size": 99, **SMALL}
CLIP_TEXT: dict[str, Any] = {"model_type": "clip_text_model", "vocab_size": 99, "eos_token_id": 98, **SMALL}


@pytest.mark.parametrize(
    ("config", "pooling", "tokens"),
    [
        (VIT, "cls", (17, 32)),
        (VIT, "mean", (17, 32)),
        (VIT, "pooler", (17, 32)),
        (RESNET, "mean", (16, 16)),
        (RESNET, "pooler", (16, 16)),
        (CONVNEXT, "mean", (1, 16)),
        ({**VIT, "model_type": "clip_vision_model"}, "pooler", (17, 32)),
    ],
)
def test_image_shapes_and_round_trip(config: dict[str, Any], pooling: str, tokens: tuple[int, int]) -> None:
    encoder = ImageEncoder(config, pooling).eval()
    pixels = torch.randn(2, 3, 32, 32)
    output = encoder(pixels)
    assert output.tokens.shape == (2, *tokens)
    assert output.global_.shape == (2, encoder.width)
    assert output.mask is None
    again = ImageEncoder(**encoder.to_config()).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(pixels).global_, output.global_)


def test_feature_map_becomes_tokens_row_by_row() -> None:
    encoder = ImageEncoder(RESNET).eval()
    pixels = torch.randn(1, 3, 32, 64)
    feature_map = encoder.model(pixel_values=pixels).last_hidden_state
    tokens = encoder(pixels).tokens
    assert feature_map.shape[2:] == (4, 8)
    assert torch.equal(tokens[0, 8 + 3], feature_map[0, :, 1, 3])
    assert torch.allclose(encoder(pixels).global_, feature_map.mean(dim=(2, 3)), atol=1e-6)


def test_config_objects_and_models_are_taken_as_they_are() -> None:
    for config in (
        ViTConfig(image_size=32, patch_size=8, **SMALL),
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"),
        CLIPVisionConfig(image_size=32, patch_size=8, **SMALL),
    ):
        assert ImageEncoder(config)(torch.zeros(1, 3, 32, 32)).global_.shape[0] == 1
    model = ViTModel(ViTConfig(image_size=32, patch_size=8, **SMALL))
    assert ImageEncoder(model).model is model
    bert = BertModel(BertConfig(vocab_size=99, **SMALL))
    assert TextEncoder(bert).model is bert


def test_a_trunk_without_its_pooler_has_no_idle_parameters() -> None:
    for encoder, batch in (
        (ImageEncoder(VIT, "cls"), torch.randn(2, 3, 32, 32)),
        (TextEncoder(BERT, "mean"), torch.randint(0, 99, (2, 5))),
    ):
        encoder(batch).global_.square().sum().backward()
        assert [name for name, value in encoder.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "pooler"])
def test_text_padding_does_not_change_the_vector(pooling: str) -> None:
    encoder = TextEncoder(BERT, pooling).eval()
    ids = torch.tensor([[7, 8, 9]])
    padded = torch.tensor([[7, 8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    assert torch.allclose(encoder(ids).global_, encoder(padded, mask).global_, atol=1e-5)
    assert encoder(padded, mask).mask.tolist() == [[True, True, True, False, False]]


def test_pooling_picks_the_token_it_names() -> None:
    ids = torch.tensor([[5, 98, 6, 98], [7, 8, 98, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    encoder = TextEncoder(CLIP_TEXT, "eos").eval()
    output = encoder(ids, mask)
    assert torch.equal(output.global_, output.tokens[torch.arange(2), torch.tensor([1, 2])])
    assert TextEncoder(CLIP_TEXT, "eos", eos_token_id=8).eos_token_id == 8
    last = TextEncoder(CLIP_TEXT, "last").eval()(ids, mask)
    assert torch.equal(last.global_, last.tokens[torch.arange(2), torch.tensor([3, 2])])
    mean = TextEncoder(BERT, "mean").eval()(ids, mask)
    assert torch.allclose(mean.global_[1], mean.tokens[1, :3].mean(dim=0), atol=1e-6)


def test_mean_of_nothing_is_zero() -> None:
    encoder = TextEncoder(BERT, "mean").eval()
    output = encoder(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3))
    assert torch.equal(output.global_, torch.zeros(1, 32))


def test_local_folder(tmp_path: Path) -> None:
    model = BertModel(BertConfig(vocab_size=99, **SMALL), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "bert")
    encoder = TextEncoder(str(tmp_path / "bert")).eval()
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(encoder(ids).tokens, model(input_ids=ids).last_hidden_state)


def test_folder_of_a_system(tmp_path: Path) -> None:
    """Each encoder is found by its name in what a run exported, with its weights."""
    trained = CLIP(ImageEncoder(VIT), TextEncoder(BERT), projection_dim=8).eval()
    trained.save_pretrained(tmp_path)
    text, image = TextEncoder(str(tmp_path)).eval(), ImageEncoder(tmp_path).eval()
    ids, pixels = torch.tensor([[5, 6, 7]]), torch.randn(2, 3, 32, 32)
    assert torch.equal(text(ids).tokens, trained.text_encoder(ids).tokens)
    assert torch.equal(image(pixels).tokens, trained.image_encoder(pixels).tokens)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_encoder": None}))
    with pytest.raises(OSError, match=f"text_encoder: the CLIP in {tmp_path} has no text_encoder"):
        TextEncoder(tmp_path)
    other = {"model": {**config["text_encoder"]["model"], "vocab_size": 98}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_encoder": other}))
    with pytest.raises(OSError, match="text_encoder: cannot read its weights .*size mismatch"):
        TextEncoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(OSError, match="image_encoder: cannot read its weights from"):
        ImageEncoder(tmp_path)


def test_pickled_folder_only_by_name(tmp_path: Path) -> None:
    model = BertModel(BertConfig(vocab_size=99, **SMALL), add_pooling_layer=False).eval()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="allow_pickle=True"):
        TextEncoder(str(tmp_path))
    encoder = TextEncoder(str(tmp_path), allow_pickle=True).eval()
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(encoder(ids).tokens, model(input_ids=ids).last_hidden_state)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="text_encoder: no folder"):
        TextEncoder(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="config.json"):
        ImageEncoder(tmp_path)
    ViTModel(ViTConfig(image_size=32, patch_size=8, **SMALL)).save_pretrained(tmp_path / "vit")
    weights = tmp_path / "vit" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="image_encoder: cannot read a model"):
        ImageEncoder(tmp_path / "vit")


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: TextEncoder({"model_type": "bertx"}), ValueError, "text_encoder.*bertx"),
        (lambda: TextEncoder({"hidden_size": 3}), ValueError, "model_type"),
        (lambda: TextEncoder({**BERT, "hiden_size": 3}), ValueError, "BertConfig has no hiden_size"),
        (lambda: TextEncoder({**BERT, "hidden_size": "wide"}), ValueError, "hidden_size"),
        (lambda: TextEncoder(BERT, "max"), ValueError, "pooling"),
        (lambda: TextEncoder(BERT, "mean", eos_token_id=3), ValueError, "eos_token_id"),
        (lambda: TextEncoder(BERT, "eos"), ValueError, "eos_token_id"),
        (lambda: ImageEncoder(VIT, "eos"), ValueError, "pooling"),
        (lambda: ImageEncoder(3), TypeError, "image_encoder.*int"),
        (lambda: ImageEncoder(RESNET, "cls")(torch.zeros(1, 3, 32, 32)), ValueError, "class token"),
        (lambda: ImageEncoder(VIT)(torch.zeros(3, 32, 32)), ValueError, "pixel_values"),
        (lambda: ImageEncoder(VIT)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), TypeError, "pixel_values"),
        (lambda: TextEncoder(BERT)(torch.zeros(1, 3)), TypeError, "input_ids"),
        (lambda: TextEncoder(BERT)(torch.zeros(3, dtype=torch.int64)), ValueError, "input_ids"),
        (lambda: TextEncoder(BERT)(torch.tensor([[99]])), ValueError, r"\[0, 99\)"),
        (lambda: TextEncoder(BERT)(torch.tensor([[-1]])), ValueError, "got -1"),
        (
            lambda: TextEncoder(BERT)(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 4)),
            ValueError,
            "attention_mask",
        ),
        (
            lambda: TextEncoder(CLIP_TEXT, "eos")(torch.zeros(1, 3, dtype=torch.int64)),
            ValueError,
            "row 0 has none",
        ),
    ],
)
def test_bad_input(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


def test_projection_heads() -> None:
    linear = ProjectionHead(8, 4)
    assert [name for name, _ in linear.named_parameters()] == ["output.weight"]
    assert torch.equal(linear(torch.eye(8)), linear.output.weight.T)
    mlp = ProjectionHead(8, 4, "mlp", hidden_features=16)
    assert [type(layer) for layer in mlp.layers] == [nn.Linear, nn.ReLU]
    assert mlp.output.weight.shape == (4, 16)
    bn = ProjectionHead(8, 4, "mlp_bn")
    assert [type(layer) for layer in bn.layers] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert bn.layers[0].bias is None
    assert bn(torch.randn(3, 8)).shape == (3, 4)
    for kind in ("linear", "mlp", "mlp_bn"):
        head = ProjectionHead(8, 4, kind, bias=True)
        again = ProjectionHead(8, 4, **head.to_config())
        assert {n: p.shape for n, p in again.named_parameters()} == {
            n: p.shape for n, p in head.named_parameters()
        }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "conv"}, "kind"),
        ({"in_features": 0}, "in_features"),
        ({"out_features": 0}, "out_features"),
        ({"hidden_features": 3}, "hidden_features"),
        ({"kind": "mlp", "hidden_features": 0}, "hidden_features"),
    ],
)
def test_projection_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ProjectionHead(**{"in_features": 8, "out_features": 4, **options})
