"""What XMC-GAN's two networks are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization


def square(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def pointwise(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 1x1 convolution."""
    return nn.Conv2d(in_channels, out_channels, 1)


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation whose gain and offset depend on a condition, everywhere or place by place.

        y = (1 + W_g c + b_g) * (x - mean) / sqrt(variance + 1e-5) + W_b c + b_b

    Mean and variance are over the batch and all places, running ones in evaluation mode (momentum 0.9). A condition [B, C, 1, 1]
    serves every place (conditional batch norm); one of the size of x modulates each place by itself (the local form of XMC-GAN's
    attentional self-modulation).

    Args:
        channels: of x.
        condition: C, channels of the condition.
    """

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1, affine=False)
        self.gain, self.offset = pointwise(condition, channels), pointwise(condition, channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Features [B, channels, h, w] under a condition [B, C, 1, 1] or [B, C, h', w'], the latter resized to h x w."""
        # a 1x1 convolution commutes with copying pixels, and is cheaper before it
        gain, offset = (_stretch(layer(condition), x) for layer in (self.gain, self.offset))
        return self.norm(x) * (1 + gain) + offset


def _stretch(modulation: Tensor, x: Tensor) -> Tensor:
    """At the size of x, by nearest neighbour; what has one place is left to broadcasting."""
    if modulation.shape[-2:] in ((1, 1), x.shape[-2:]):
        return modulation
    return F.interpolate(modulation, size=x.shape[-2:], mode="nearest")


class GeneratorBlock(nn.Module):
    """Doubles the size: norm, ReLU, upsampling, 3x3, norm, ReLU, 3x3, beside an upsampled 1x1 shortcut.

    Args:
        in_channels, out_channels: of the features.
        condition: channels of the condition of both norms.
    """

    def __init__(self, in_channels: int, out_channels: int, condition: int) -> None:
        super().__init__()
        self.norm_in = ConditionalBatchNorm(in_channels, condition)
        self.conv_in = square(in_channels, out_channels)
        self.norm_out = ConditionalBatchNorm(out_channels, condition)
        self.conv_out = square(out_channels, out_channels)
        self.shortcut = pointwise(in_channels, out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B, in_channels, h, w] to [B, out_channels, 2h, 2w]."""
        y = self.conv_in(_double(F.relu(self.norm_in(x, condition))))
        y = self.conv_out(F.relu(self.norm_out(y, condition)))
        # a 1x1 convolution commutes with copying pixels, and is cheaper before it
        return y + _double(self.shortcut(x))


class DiscriminatorBlock(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, beside a 1x1 shortcut where the shape changes; both averaged over 2x2 places to halve the size.

    Args:
        in_channels, out_channels: of the features.
        downsample: halve the size.
        first: the block sees pixels: no ReLU before its first convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, downsample: bool = True, first: bool = False
    ) -> None:
        super().__init__()
        self.downsample, self.first = downsample, first
        self.conv_in, self.conv_out = square(in_channels, out_channels), square(out_channels, out_channels)
        changes = downsample or in_channels != out_channels
        self.shortcut = pointwise(in_channels, out_channels) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, h, w] to [B, out_channels, h/2, w/2], or the same size."""
        y = self.conv_in(x if self.first else F.relu(x))
        y = self.conv_out(F.relu(y))
        # averaging commutes with a 1x1 convolution, which is then a quarter of the work
        shortcut = self.shortcut(F.avg_pool2d(x, 2) if self.downsample else x)
        return (F.avg_pool2d(y, 2) if self.downsample else y) + shortcut


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class SpectralNorm(parametrizations._SpectralNorm):
    """torch's spectral norm, in full precision: CUDA's autocast would take the norm, and so its gradient, in bfloat16."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight over its largest singular value."""
        with torch.autocast(weight.device.type, enabled=False):
            normalised: Tensor = super().forward(weight)
        return normalised


def normalise_spectra(network: nn.Module) -> None:
    """Divide the weights of all convolutions and linear layers by their spectral norms from now on."""
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            register_parametrization(module, "weight", SpectralNorm(module.weight))
