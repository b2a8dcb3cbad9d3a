"""The frozen network whose vectors of real and generated pictures XMC-GAN's pretrained image loss compares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.encoders import ImageEncoder

IMAGE_SIZE = 224
"""Of networks whose configuration says none, as those of ImageNet."""


class FrozenNetwork:
    """Any network from pictures [B, 3, H, W] to vectors [B, F], such as a program of `torch.export`.

    It is no part of the system that holds it: neither trained, nor in its state, nor saved with it. It goes where its pictures
    are.

    Args:
        network: put into evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False)
        # an exported program stays in the mode that it was exported in
        with suppress(NotImplementedError):
            network.eval()

    def __call__(self, pictures: Tensor) -> Tensor:
        """The vectors.

        Raises:
            TypeError: the network returns something else.
        """
        kept = next(chain(self.network.parameters(), self.network.buffers()), pictures)
        if kept.device != pictures.device:
            self.network.to(pictures.device)
        vectors = self.network(pictures)
        if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != len(pictures):
            found = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise TypeError(f"image_encoder: expected vectors [{len(pictures)}, F], got {found}")
        return vectors


def pretrained_vectors(
    encoder: ImageEncoder | FrozenNetwork,
    pictures: Tensor,
    size: int | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Vectors [B, F] of pictures [B, 3, H, W] in [0, 1], which are resized (bilinear) and normalised before.

    Args:
        encoder: the network.
        pictures: gradients reach them.
        size: in pixels; when None the encoder's own, or 224 where it says none.
        mean, std: of the normalisation.
    """
    if size is None:
        own = getattr(encoder.model.config, "image_size", None) if isinstance(encoder, ImageEncoder) else None
        size = own if isinstance(own, int) else IMAGE_SIZE
    if pictures.shape[-1] != size:
        pictures = F.interpolate(
            pictures, size=(size, size), mode="bilinear", align_corners=False, antialias=True
        )
    centre, spread = (
        torch.tensor(values, device=pictures.device, dtype=pictures.dtype)[:, None, None]
        for values in (mean, std)
    )
    found = encoder((pictures - centre) / spread)
    return found if isinstance(found, Tensor) else found.global_
