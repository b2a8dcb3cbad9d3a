"""Layers of encoders: grids, prefixes, hidden states, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from jrl.encoders import GridTokens, ImageEncoder, TextEncoder, encode_grids, encode_words, layer_width
from jrl.encoders.layers import layer_widths

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT: dict[str, Any] = {"model_type": "vit", "image_size": 32, "patch_size": 8, **SMALL}
BERT: dict[str, Any] = {"model_type": "bert", "vocab_size": 40, "max_position_embeddings": 16, **SMALL}
REGISTERS = {key: value for key, value in VIT.items() if key != "intermediate_size"}
REGISTERS["model_type"] = "dinov2_with_registers"
RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [12, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
CONVNEXT: dict[str, Any] = {
    "model_type": "convnext",
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_stages": 2,
}


@pytest.mark.parametrize(
    ("config", "grids"),
    [
        (RESNET, {0: (8, 8), 1: (8, 8), 2: (4, 4), -1: (4, 4)}),
        (CONVNEXT, {0: (8, 8), 2: (4, 4), -1: (4, 4)}),
        (VIT, {0: (4, 4), 1: (4, 4), -1: (4, 4)}),
        ({**VIT, "model_type": "clip_vision_model"}, {0: (4, 4), 1: (4, 4), -1: (4, 4)}),
        (REGISTERS, {1: (4, 4), -1: (4, 4)}),
    ],
)
def test_grids_of_chosen_layers(config: dict[str, Any], grids: dict[int, tuple[int, int]]) -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    output, found = encode_grids(encoder, pixels, list(grids))
    torch.testing.assert_close(output.tokens, encoder(pixels).tokens)
    states = encoder.model(pixel_values=pixels, output_hidden_states=True).hidden_states
    for (layer, grid), tokens in zip(grids.items(), found, strict=True):
        width = layer_width(encoder.model, layer, "layers")
        assert tokens.grid == grid
        assert tokens.tokens.shape == (2, grid[0] * grid[1], width)
        whole = output.tokens if layer == -1 else states[layer]
        whole = whole.flatten(2).transpose(1, 2) if whole.ndim == 4 else whole
        torch.testing.assert_close(tokens.tokens, whole[:, -grid[0] * grid[1] :])
    assert not encoder.model._forward_hooks
    assert not encoder.model._forward_pre_hooks


def test_grid_of_a_wide_picture() -> None:
    encoder = ImageEncoder(RESNET).eval()
    _, (grid,) = encode_grids(encoder, torch.zeros(1, 3, 32, 64))
    assert grid.grid == (4, 8)


@pytest.mark.parametrize(("config", "side"), [(RESNET, 64), (RESNET, 70), (CONVNEXT, 64), (VIT, 64)])
def test_locations_see_what_lies_around_their_shifted_centres(config: dict[str, Any], side: int) -> None:
    layers = [0, 1, 2, -1]
    draws: dict[int, list[float]] = {layer: [] for layer in layers}
    shifts: dict[int, tuple[int, float]] = {}
    for seed in range(8 if config is not VIT else 1):
        torch.manual_seed(seed)
        encoder = ImageEncoder({**config, "image_size": side} if config is VIT else config).eval()
        pixels = torch.randn(1, 3, side, side, requires_grad=True)
        _, grids = encode_grids(encoder, pixels, layers, locate=True)
        for layer, grid in zip(layers, grids, strict=True):
            assert grid.shift[0] == grid.shift[1]
            count, middle = grid.grid[0], grid.grid[0] // 2
            shifts[layer] = count, (middle + 0.5 + grid.shift[0]) * side / count
            # attention over patches reaches everything, whatever its place
            if config is VIT:
                assert grid.shift == (0.0, 0.0)
                continue
            seen = grid.tokens[0, middle * count + middle].square().sum()
            (gradient,) = torch.autograd.grad(seen, pixels, retain_graph=True)
            weight = gradient.abs().sum(dim=(0, 1, 2))
            draws[layer].append(float((weight * (torch.arange(side) + 0.5)).sum() / weight.sum()))
    for layer, found in draws.items():
        # the middle of the tile lies 1.5 and 3.5 pixels beside that of a ResNet's location
        assert not found or sum(found) / len(found) == pytest.approx(shifts[layer][1], abs=0.4)
    assert all(grid.shift == (0.0, 0.0) for grid in encode_grids(encoder, pixels, layers)[1])


def test_a_pooled_grid_keeps_its_centres() -> None:
    fine = GridTokens(torch.zeros(1, 64, 1), (8, 8), (-0.375, 0.25))
    coarse = fine.pooled(2)
    for axis in (0, 1):
        centres = [(i + 0.5 + fine.shift[axis]) / 8 for i in range(8)]
        means = [(a + b) / 2 for a, b in zip(centres[::2], centres[1::2], strict=True)]
        assert [(i + 0.5 + coarse.shift[axis]) / 4 for i in range(4)] == pytest.approx(means)


def test_words_of_chosen_layers_and_their_gradients() -> None:
    encoder = TextEncoder(BERT).eval()
    ids = torch.randint(5, 40, (2, 6))
    output, (first, last) = encode_words(encoder, ids, None, [0, -1])
    torch.testing.assert_close(last, output.tokens)
    embedding = encoder.model.get_input_embeddings().weight
    layer = encoder.model.encoder.layer[0].attention.self.query.weight
    of_first = torch.autograd.grad(first.sum(), [embedding, layer], retain_graph=True, allow_unused=True)
    assert of_first[0] is not None
    assert of_first[1] is None
    assert torch.autograd.grad(last.square().sum(), layer)[0].any()


def test_hooks_go_when_the_encoder_fails() -> None:
    encoder = TextEncoder(BERT)
    with pytest.raises(ValueError, match="input_ids: expected ids"):
        encode_words(encoder, torch.full((1, 3), 99), None, [0])
    assert not encoder.model._forward_hooks
    assert not encoder.model._forward_pre_hooks


def test_pooled_grids_are_means() -> None:
    map_ = torch.arange(2.0 * 3 * 5 * 2).view(2, 3, 5, 2)
    grid = GridTokens(map_.flatten(1, 2), (3, 5))
    assert grid.pooled(1) is grid
    pooled = grid.pooled(2)
    assert pooled.grid == (2, 3)
    cells = pooled.tokens.unflatten(1, (2, 3))
    torch.testing.assert_close(cells[:, 0, 0], map_[:, :2, :2].mean(dim=(1, 2)))
    torch.testing.assert_close(cells[:, 1, 1], map_[:, 2:, 2:4].mean(dim=(1, 2)))
    torch.testing.assert_close(cells[:, 1, 2], map_[:, 2, 4])
    with pytest.raises(ValueError, match="factor: expected at least 1, got 0"):
        grid.pooled(0)


def test_refusals() -> None:
    encoder = ImageEncoder(RESNET)
    assert layer_widths(encoder.model) == [8, 12, 16]
    with pytest.raises(ValueError, match="layers: image: expected -1 for the last layer or 0 to 2, got 3"):
        layer_width(encoder.model, 3, "layers: image")
    with pytest.raises(ValueError, match="does not say how many layers there are"):
        layer_widths(nn.Linear(2, 2))
    swin = {
        "model_type": "swin",
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 1],
        "window_size": 4,
    }
    with pytest.raises(ValueError, match="which lie on no grid of patches of 4"):
        encode_grids(ImageEncoder(swin), torch.zeros(1, 3, 32, 32))
