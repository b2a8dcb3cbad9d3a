"""XMC-GAN: text to image with attentional self-modulation and contrastive losses."""

from __future__ import annotations

from jrl.systems.xmc_gan.networks import Discriminator, Generator
from jrl.systems.xmc_gan.system import XMCGAN

__all__ = ["XMCGAN", "Discriminator", "Generator"]
