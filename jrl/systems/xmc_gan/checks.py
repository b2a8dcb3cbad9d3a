"""What an XMC-GAN can be made of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from jrl.encoders import TextEncoder
from jrl.systems.xmc_gan.networks import Discriminator, Generator

CONTRASTIVE = ("sentence", "word", "image", "image_pretrained")
SENTENCE_POOLING = ("code", "mean", "encoder")


def check_parts(
    generator: Generator,
    discriminator: Discriminator,
    text_encoder: TextEncoder,
    image_encoder: nn.Module | None,
    losses: Mapping[str, float] | None,
) -> Mapping[str, float]:
    """The weights of the losses, where the parts fit each other.

    Raises:
        TypeError: a part is of another type.
        ValueError: parts do not fit, an unknown loss, or a negative weight.
    """
    for name, value, kind in (
        ("generator", generator, Generator),
        ("discriminator", discriminator, Discriminator),
        ("text_encoder", text_encoder, TextEncoder),
        ("image_encoder", image_encoder, (nn.Module, type(None))),
    ):
        if not isinstance(value, kind):
            expected = "a network or None" if isinstance(kind, tuple) else kind.__name__
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    for name in ("image_size", "text_dim"):
        ours, theirs = generator.config[name], discriminator.config[name]
        if ours != theirs:
            raise ValueError(f"discriminator: expected the generator's {name} {ours}, got {theirs}")
    if generator.config["text_dim"] != text_encoder.width:
        raise ValueError(
            f"generator: expected text_dim {text_encoder.width}, the text encoder's width, "
            f"got {generator.config['text_dim']}"
        )
    if losses is None:
        losses = {
            name: 1.0 for name in CONTRASTIVE if name != "image_pretrained" or image_encoder is not None
        }
    unknown = sorted(set(losses) - set(CONTRASTIVE))
    if unknown:
        raise ValueError(f"losses: expected some of {', '.join(CONTRASTIVE)}, got {', '.join(unknown)}")
    if any(not weight >= 0 for weight in losses.values()):
        raise ValueError(f"losses: expected weights of 0 or more, got {dict(losses)}")
    if losses.get("image_pretrained", 0) > 0 and image_encoder is None:
        raise ValueError("losses: 'image_pretrained' needs an image_encoder")
    return losses


def check_options(
    *,
    directions: str,
    sentence_pooling: str,
    discriminator_steps: int,
    discriminator_lr_factor: float,
    gradient_penalty: float,
    average_decay: float,
    temperature: float,
    word_scale: float,
    image_encoder_size: int | None,
) -> None:
    """Options by themselves.

    Raises:
        ValueError: one is out of range.
    """
    if directions not in ("both", "one"):
        raise ValueError(f"directions: expected 'both' or 'one', got {directions!r}")
    if sentence_pooling not in SENTENCE_POOLING:
        raise ValueError(
            f"sentence_pooling: expected one of {', '.join(SENTENCE_POOLING)}, got {sentence_pooling!r}"
        )
    if discriminator_steps < 1:
        raise ValueError(f"discriminator_steps: expected at least 1, got {discriminator_steps}")
    if not discriminator_lr_factor > 0:
        raise ValueError(
            f"discriminator_lr_factor: expected a positive number, got {discriminator_lr_factor}"
        )
    if not gradient_penalty >= 0:
        raise ValueError(f"gradient_penalty: expected 0 or more, got {gradient_penalty}")
    if not 0 <= average_decay < 1:
        raise ValueError(f"average_decay: expected a value in [0, 1), got {average_decay}")
    if image_encoder_size is not None and image_encoder_size < 1:
        raise ValueError(f"image_encoder_size: expected at least 1 pixel, got {image_encoder_size}")
    if not temperature > 0 or not word_scale > 0:
        raise ValueError(
            f"temperature, word_scale: expected positive numbers, got {temperature}, {word_scale}"
        )
