"""Attention critics between layers of two encoders: how they are made and where they sit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from jrl.encoders import ProjectionHead
from jrl.objectives import AttentionCritic

PROJECTIONS = ("linear", "mlp", "mlp_bn", "identity")


@dataclass
class CriticOptions:
    """How every critic is made.

    Args:
        dim: D of keys, queries and values; with "identity" it is the layers' width, whatever is said here.
        projection: the networks that make them: "mlp_bn" (Linear-BatchNorm-ReLU-Linear), "mlp", "linear" or "identity".
        hidden: width inside an MLP; the layer's own when None.
        scale: factor of the attention's logits; 1/√D when None.
        length_norm: "none" or "mean": whether a score is a sum or a mean over the words.
        per_word: score each word and let it pick its picture, as info-ground does.
        backend: of the kernel.
    """

    dim: int = 256
    projection: str = "mlp_bn"
    hidden: int | None = None
    scale: float | None = 1.0
    length_norm: str = "none"
    per_word: bool = False
    backend: str = "auto"


@dataclass
class LayerPair:
    """Layers whose mutual information is maximised.

    Args:
        image, text: −1 for the last layer's output, 0 for the embedding, n for the output of layer or stage n.
        weight: of this bound in the loss.
        image_pool: side of the squares of locations that are averaged before the critic sees them.
        text_stride: the critic sees every so many words of a caption, from its first on; all of them at 1.
    """

    image: int = -1
    text: int = -1
    weight: float = 1.0
    image_pool: int = 1
    text_stride: int = 1

    @property
    def name(self) -> str:
        """What its critic and its bound are called."""
        if self.image == self.text == -1:
            return "last"
        sides = (("image", self.image), ("text", self.text))
        return "_".join(f"{side}_{'last' if layer == -1 else layer}" for side, layer in sides)


def build_critic(options: CriticOptions, image_width: int, text_width: int) -> AttentionCritic:
    """A critic with fresh weights between layers of these widths.

    Raises:
        ValueError: an option is out of range, or "identity" between layers of two widths.
    """
    if options.projection not in PROJECTIONS:
        raise ValueError(
            f"critic: projection: expected one of {', '.join(PROJECTIONS)}, got {options.projection!r}"
        )
    if options.dim < 1:
        raise ValueError(f"critic: dim: expected at least 1, got {options.dim}")
    if options.hidden is not None and not options.projection.startswith("mlp"):
        raise ValueError(f"critic: hidden: has a meaning only for 'mlp' and 'mlp_bn', got {options.hidden}")
    if options.hidden is not None and options.hidden < 1:
        raise ValueError(f"critic: hidden: expected at least 1, got {options.hidden}")
    if options.projection == "identity" and image_width != text_width:
        raise ValueError(
            f"critic: the projection 'identity' needs layers of one width, got {image_width} and {text_width}"
        )

    def network(width: int) -> nn.Module:
        if options.projection == "identity":
            return nn.Identity()
        return ProjectionHead(
            width, options.dim, options.projection, hidden_features=options.hidden, bias=True
        )

    return AttentionCritic(
        network(image_width),
        network(image_width),
        network(text_width),
        network(text_width),
        scale=options.scale,
        length_norm=options.length_norm,
        per_word=options.per_word,
        backend=options.backend,
    )
