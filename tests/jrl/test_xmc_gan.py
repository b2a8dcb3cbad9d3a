"""XMC-GAN: golden values of its losses, its networks' sizes and what reaches their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jrl.objectives.generation import (
    hinge_discriminator,
    hinge_generator,
    pair_contrastive,
    word_contrastive,
)
from jrl.systems.xmc_gan.blocks import ConditionalBatchNorm, DiscriminatorBlock, GeneratorBlock
from jrl.systems.xmc_gan.networks import Discriminator, Generator
from tests.ops.conformance import det

LENGTHS = torch.tensor([6, 4, 2])
WORD_MASK = torch.arange(6) < LENGTHS[:, None]


class TestLosses:
    @pytest.mark.parametrize(("scale", "value"), [(50.0, 5.6061440583), (10.0, 2.4413212982)])
    def test_word_loss(self, scale: float, value: float) -> None:
        loss, _ = word_contrastive(
            det(3, 4, 5, a=0.37), det(3, 6, 5, a=0.53), WORD_MASK, scale=scale, backend="reference"
        )
        assert loss.item() == pytest.approx(value, rel=1e-9)

    def test_pair_loss(self) -> None:
        loss, stats = pair_contrastive(det(4, 6, a=0.37), det(4, 6, a=0.53), backend="reference")
        assert loss.item() == pytest.approx(20.6409361870, rel=1e-9)
        assert stats["accuracy"].item() == 0.25

    def test_sentence_loss_of_attngan(self) -> None:
        """AttnGAN's `sent_loss`, its two directions: the same cosines over γ3 = 10."""
        x, y = det(4, 6, a=0.37), det(4, 6, a=0.53)
        for first, second, value in ((x, y, 9.5748881645), (y, x, 11.0660480225)):
            loss, _ = pair_contrastive(first, second, directions="one", backend="reference")
            assert loss.item() == pytest.approx(value, rel=1e-9)

    def test_hinge(self) -> None:
        real, fake = 2 * det(4, 1, a=0.37), 2 * det(4, 1, a=0.53)
        assert hinge_discriminator(real, fake).item() == pytest.approx(2.6845147441, rel=1e-9)
        assert hinge_generator(fake).item() == pytest.approx(-1.6153224601, rel=1e-9)

    def test_directions_differ_and_add_up(self) -> None:
        x, y = det(4, 6, a=0.37), det(4, 6, a=0.53)
        there, _ = pair_contrastive(x, y, directions="one", backend="reference")
        back, _ = pair_contrastive(y, x, directions="one", backend="reference")
        both, _ = pair_contrastive(x, y, backend="reference")
        assert there.item() != pytest.approx(back.item(), rel=1e-3)
        assert both.item() == pytest.approx(there.item() + back.item(), rel=1e-12)

    def test_one_pair(self) -> None:
        loss, stats = word_contrastive(torch.randn(1, 4, 5), torch.randn(1, 3, 5))
        assert loss.item() == pytest.approx(0, abs=1e-6) and stats["accuracy"].item() == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"directions": "two"}, "directions: expected 'both' or 'one', got 'two'"),
            ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ],
    )
    def test_messages(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pair_contrastive(torch.randn(2, 3), torch.randn(2, 3), **options)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class TestNetworks:
    def test_parameter_counts_of_the_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # 78.5 and 87.9 million random weights need not be orthogonal to be counted
        monkeypatch.setattr(nn.init, "orthogonal_", lambda weight: weight)
        assert parameters(Generator(128)) == 78_507_779
        assert parameters(Discriminator(128)) == 87_911_713

    @pytest.mark.parametrize(
        ("size", "options"),
        [
            (32, {}),
            (64, {}),
            (64, {"attention_size": 32}),
            (128, {}),
            (16, {"channels": [2, 1]}),
        ],
    )
    def test_generator(self, size: int, options: dict[str, Any]) -> None:
        # wide enough that no ReLU is dead for every picture
        torch.manual_seed(0)
        generator = Generator(size, text_dim=12, width=8, noise_dim=6, condition_dim=5, **options)
        noise, sentence, words, mask = texts(3)
        pictures = generator(noise, sentence, words, mask)
        assert pictures.shape == (3, 3, size, size)
        assert pictures.min() >= 0 and pictures.max() <= 1 and pictures.std() > 0
        pictures.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())

    @pytest.mark.parametrize(("size", "regions"), [(32, 64), (64, 256), (128, 256), (256, 256)])
    def test_discriminator(self, size: int, regions: int) -> None:
        torch.manual_seed(0)
        discriminator = Discriminator(size, text_dim=12, width=8)
        judged = discriminator(torch.rand(3, 3, size, size), torch.randn(3, 12))
        assert judged.logits.shape == (3,) and judged.regions.shape == (3, regions, 12)
        assert judged.image.shape == judged.sentence.shape
        torch.stack([part.square().sum() for part in vars(judged).values()]).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in discriminator.parameters())

    def test_a_small_discriminator(self) -> None:
        judged = Discriminator(16, text_dim=12, width=2, channels=[1, 1, 1])(
            torch.rand(3, 3, 16, 16), torch.randn(3, 12)
        )
        assert judged.regions.shape == (3, 64, 12)

    def test_regions_are_where_they_are_seen(self) -> None:
        """A change of one corner changes the regions of that corner and no distant ones."""
        discriminator = Discriminator(64, text_dim=12, width=2).eval()
        pictures = torch.rand(1, 3, 64, 64)
        changed = pictures.clone()
        changed[:, :, :8, :8] += 0.5
        sentence = torch.randn(1, 12)
        moved = (discriminator(pictures, sentence).regions - discriminator(changed, sentence).regions).abs()
        grid = moved.sum(-1).view(16, 16)
        assert grid[0, 0] > 0 and grid[8:, 8:].max() == 0

    def test_spectral_norm(self) -> None:
        discriminator = Discriminator(32, text_dim=12, width=4)
        for module in discriminator.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.parametrizations.weight.original.data.mul_(7)
        discriminator.train()
        for _ in range(60):
            discriminator(torch.rand(2, 3, 32, 32), torch.randn(2, 12))
        for module in discriminator.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                largest = torch.linalg.matrix_norm(module.weight.flatten(1), ord=2)
                assert largest.item() == pytest.approx(1, abs=0.02)

    def test_spectral_norm_under_autocast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In full precision, also where autocast knows the products of its power iteration: CUDA's `mv`, here the CPU's `mm`."""
        discriminator = Discriminator(32, text_dim=12, width=4).eval()
        monkeypatch.setattr(
            torch, "mv", lambda matrix, vector: torch.mm(matrix, vector[:, None])[:, 0].float()
        )
        plain = discriminator.sentence.weight
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(discriminator.sentence.weight, plain)

    def test_padding_words_change_nothing(self) -> None:
        generator = Generator(32, text_dim=12, width=2, noise_dim=6, condition_dim=5).eval()
        noise, sentence, words, mask = texts(3)
        other = torch.where(mask[:, :, None], words, 9.0)
        torch.testing.assert_close(
            generator(noise, sentence, words, mask), generator(noise, sentence, other, mask)
        )
        assert not torch.equal(
            generator(noise, sentence, words, mask), generator(noise, sentence, -words, mask)
        )

    def test_first_input(self) -> None:
        code = Generator(32, text_dim=12, width=2, noise_dim=6, condition_dim=5)
        patent = Generator(
            32, text_dim=12, width=2, noise_dim=6, condition_dim=5, first_input="noise_and_text"
        )
        assert code.start.in_features == 6 and patent.start.in_features == 11
        noise, sentence, words, mask = texts(2)
        assert patent(noise, sentence, words, mask).shape == (2, 3, 32, 32)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Generator(48), r"image_size: expected 4 times a power of two, got 48"),
            (lambda: Generator(512), r"image_size: Generator has no table for 512"),
            (lambda: Generator(64, channels=[1, 2]), r"channels: expected 4 positive multiples"),
            (
                lambda: Generator(64, attention_size=64),
                r"attention_size: expected between 8 and 32, got 64",
            ),
            (lambda: Generator(64, first_input="text"), r"first_input: expected 'noise' or"),
            (lambda: Generator(8, channels=[1]), "image_size: expected at least 16, got 8"),
            (lambda: Discriminator(8, channels=[1, 1]), "image_size: expected at least 16, got 8"),
            (lambda: Generator(32, width=0), "width: expected at least 1, got 0"),
            (lambda: Discriminator(32, width=0), "width: expected at least 1, got 0"),
            (lambda: Discriminator(32, text_dim=0), "text_dim: expected at least 1, got 0"),
            (lambda: Generator(32, noise_dim=0), "noise_dim: expected at least 1, got 0"),
            (
                lambda: Generator(32, attention_scale=-1.0),
                "attention_scale: expected a positive number, got -1.0",
            ),
            (
                lambda: Generator(32, attention_scale=math.nan),
                "attention_scale: expected a positive number, got nan",
            ),
            (
                lambda: Discriminator(64, region_size=64),
                r"region_size: expected between 4 and 32, got 64",
            ),
        ],
    )
    def test_messages(self, make: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()


class TestBlocks:
    def test_conditional_norm_by_formula(self) -> None:
        norm = ConditionalBatchNorm(3, 4).double()
        x, condition = (
            torch.randn(2, 3, 4, 4, dtype=torch.float64),
            torch.randn(2, 4, 2, 2, dtype=torch.float64),
        )
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = x.var((0, 2, 3), unbiased=False, keepdim=True)
        wide = condition.repeat_interleave(2, 2).repeat_interleave(2, 3)

        def linear(layer: nn.Conv2d) -> Tensor:
            weight, bias = layer.weight[:, :, 0, 0], layer.bias
            assert bias is not None
            return torch.einsum("oc,bchw->bohw", weight, wide) + bias[:, None, None]

        expected = (1 + linear(norm.gain)) * (x - mean) / (variance + 1e-5).sqrt() + linear(norm.offset)
        torch.testing.assert_close(norm(x, condition), expected)

    def test_shortcuts(self) -> None:
        """With the other branch at zero a block is its shortcut: upsampled, or averaged over 2 x 2 places."""
        x = torch.randn(2, 3, 4, 4)
        up = GeneratorBlock(3, 5, 4)
        down = DiscriminatorBlock(3, 5)
        for block in (up, down):
            nn.init.zeros_(block.conv_out.weight)
            assert block.conv_out.bias is not None
            nn.init.zeros_(block.conv_out.bias)
        grown = up.shortcut(x).repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(up(x, torch.randn(2, 4, 1, 1)), grown)
        averaged = nn.functional.avg_pool2d(down.shortcut(x), 2)
        torch.testing.assert_close(down(x), averaged)
        same = DiscriminatorBlock(3, 3, downsample=False)
        assert isinstance(same.shortcut, nn.Identity)


def texts(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:batch, None]
    return torch.randn(batch, 6), torch.randn(batch, 12), torch.randn(batch, 5, 12), mask
