"""The loss of a pretrained network: of which pictures, of any network, and what is saved of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.encoders import ImageEncoder
from jrl.generation import load_network
from jrl.systems import load_system
from jrl.systems.xmc_gan import XMCGAN

from .test_xmc_gan_formulas import contrasted, cosines, seen
from .test_xmc_gan_system import batch, build

RESNET: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1],
    "id2label": {place: str(place) for place in range(5)},
}  # fmt: skip


class Corners(nn.Module):
    """A picture's vector: some of its pixels, so that it depends on their size and values."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures[:, :, ::5, ::5].flatten(1)


@pytest.mark.parametrize("directions", ["both", "one"])
@torch.no_grad()
def test_by_the_formula(directions: str) -> None:
    """Pictures of the network's size, normalised by its mean and deviation; the real one looks for the generated one."""
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    system = build(
        image_encoder=Corners(), image_encoder_size=20, image_mean=mean, image_std=std, directions=directions
    ).eval()
    given = batch()
    fake, *_ = seen(system, given)
    real, fake = (
        (F.interpolate(x, (20, 20), mode="bilinear", antialias=True) - torch.tensor(mean).view(3, 1, 1))
        / torch.tensor(std).view(3, 1, 1)
        for x in (given["pixel_values"], fake)
    )
    scores = cosines(Corners()(real), Corners()(fake)) / 0.1
    torch.testing.assert_close(system(given)[0]["image_pretrained"], contrasted(scores, directions))


def test_the_generator_learns_from_it() -> None:
    system = build(image_encoder=ImageEncoder(RESNET, "logits")).train()
    loss = system(batch())[0]["image_pretrained"]
    (gradient,) = torch.autograd.grad(loss, system.generator.pixels.weight)
    assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in system.parameters())


@pytest.mark.parametrize(("size", "expected"), [(None, 224), (48, 48)])
def test_the_size_of_a_network_that_says_none(size: int | None, expected: int) -> None:
    encoder = ImageEncoder(RESNET, "logits")
    shapes: list[torch.Size] = []
    encoder.register_forward_pre_hook(lambda module, given: shapes.append(given[0].shape))
    build(image_encoder=encoder, image_encoder_size=size)(batch(2))
    assert shapes == [(2, 3, expected, expected)] * 2


def test_logits_of_a_classifier(tmp_path: Path) -> None:
    """The vectors are the classifier's logits; it is saved with the system, and read from a folder of transformers."""
    encoder = ImageEncoder(RESNET, "logits").eval()
    pictures = torch.rand(2, 3, 64, 64)
    found = encoder(pictures).global_
    assert encoder.width == 5 and found.shape == (2, 5)
    encoder.model.save_pretrained(tmp_path / "resnet")
    torch.testing.assert_close(ImageEncoder(tmp_path / "resnet", "logits").eval()(pictures).global_, found)
    system = build(image_encoder=encoder, image_encoder_size=64)
    system.save_pretrained(tmp_path / "system")
    loaded = load_system(tmp_path / "system")
    assert isinstance(loaded, XMCGAN) and isinstance(loaded.image_encoder, ImageEncoder)
    assert loaded.to_config() == system.to_config() and loaded.image_encoder_size == 64
    torch.testing.assert_close(loaded.image_encoder(pictures).global_, found)
    with pytest.raises(
        ValueError, match="ForImageClassification has no last_hidden_state, which 'mean' needs"
    ):
        ImageEncoder(encoder.model)(pictures)


def test_any_network_serves_the_training_alone(tmp_path: Path) -> None:
    """Such as an exported one: its weights are neither the system's state nor saved, and it rests."""
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.Flatten()).eval()
    dynamic = ({0: torch.export.Dim("B")},)
    program = torch.export.export(network, (torch.rand(2, 3, 16, 16),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = load_network(tmp_path / "network.pt2", allow_pickle=True)
    plain, exported = (build(image_encoder=one, image_encoder_size=16) for one in (network.train(), loaded))
    for system in (plain, exported):
        system.train()
        loss = system(batch())[0]["image_pretrained"]
        assert torch.autograd.grad(loss, system.generator.pixels.weight)[0].abs().sum() > 0
    assert not network.training
    torch.testing.assert_close(
        exported.eval()(batch())[0]["image_pretrained"], plain.eval()(batch())[0]["image_pretrained"]
    )
    assert not [name for name in exported.state_dict() if name.startswith("image_encoder")]
    exported.save_pretrained(tmp_path / "system")
    found = load_system(tmp_path / "system")
    assert isinstance(found, XMCGAN) and found.image_encoder is None
    assert found.weights == {**exported.weights, "image_pretrained": 0.0}


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"image_encoder: expected vectors \[4, F\], got \[4, 3, 224, 224\]"):
        build(image_encoder=nn.Identity())(batch())
    with pytest.raises(TypeError, match="image_encoder: expected a network or None, got str"):
        build(image_encoder="resnet")
    with pytest.raises(ValueError, match="image_encoder_size: expected at least 1 pixel, got 0"):
        build(image_encoder_size=0)
