"""Losses of text-to-image generation: the adversarial ones, and XMC-GAN's contrastive ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl.objectives.contrastive import several_ranks
from jrl_kernels import distributed, info_nce, info_nce_from_scores, word_region_scores

DIRECTIONS = ("both", "one")


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of a discriminator: mean of max(0, 1 - D(x)) + mean of max(0, 1 + D(G(z))).

    Lim and Ye 2017; as in XMC-GAN.

    Args:
        real, fake: logits of real and generated pictures, float.

    Returns:
        0-d, in the dtype of the logits. Gradients: real, fake.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """The generator's side: - mean of D(G(z)). Gradient: fake."""
    return -fake.mean()


def squared_gradient(logits: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """The mean over real pictures of |dD(x)/dx|², which can be differentiated again: R1 (Mescheder et al. 2018) is γ/2 of it.

    Args:
        logits: of pictures, through layers that can be differentiated twice.
        pictures: [B, 3, H, W].

    Returns:
        0-d float32; it is squared, and so computed in full precision under autocast too.
    """
    with torch.autocast(pictures.device.type, enabled=False):
        pictures = pictures.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(logits(pictures).sum(), pictures, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3)).mean()


def pair_contrastive(
    x: Tensor, y: Tensor, *, temperature: float = 0.1, directions: str = "both", backend: str = "auto"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrast row i of x with row i of y by their cosine over a temperature.

        both:  mean of -log softmax_j(cos(x_i, y_j) / τ)_i  +  mean of -log softmax_i(cos(x_i, y_j) / τ)_j
        one:   the first term

    The sentence loss (x the pictures, y the sentences) and the image loss (x the real, y the generated pictures) of
    Zhang et al. 2021
    (XMC-GAN): its code has both directions, US 2023/0081171 one. With several ranks the rows are those of all of them
    (`jrl_kernels.distributed`), for gradients that are averaged over the ranks; every rank must then call it.

    Args:
        x, y: [B, D], float32, bfloat16 or float16 (float64 with backend "reference" or "cpu").
        temperature: τ.
        directions: "both" or "one".
        backend: of `jrl_kernels.info_nce`.

    Returns:
        The 0-d loss and detached `accuracy` and `entropy` (nats), each the mean over the directions.

    Raises:
        ValueError: another `directions`, a temperature that is not positive, different numbers of rows.

    Gradients: x, y.
    """
    with distributed.raise_together(x, y):
        direction, scale = _direction(directions), _inverse(temperature)
    loss, stats = (distributed.info_nce if several_ranks() else info_nce)(
        x, y, scale=scale, normalize=True, direction=direction, return_stats=True, backend=backend
    )
    return _summed(loss, stats, direction)


def word_contrastive(
    regions: Tensor,
    words: Tensor,
    word_mask: Tensor | None = None,
    *,
    attention_scale: float = 5.0,
    pool_scale: float = 5.0,
    scale: float = 50.0,
    directions: str = "both",
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrast every image's regions with every caption's words: XMC-GAN's word loss.

        S_ic = scale / ρ2 · log Σ_t exp(ρ2 cos(w_ct, Σ_r softmax_r(ρ1 cos(w_ct, v_ir)) v_ir / |v_ir|))

    and then the loss of `pair_contrastive` over S, with several ranks over the images and captions of all of them. The code's
    scale is 50; a scale of 1/τ = 10 would be the sentence loss's temperature.

    Args:
        regions: [B, R, E], float.
        words: [B, T, E], like regions.
        word_mask: bool [B, T], True where a word is real.
        attention_scale, pool_scale: ρ1 and ρ2.
        scale: of the scores.
        directions: "both" or "one" (each image among the captions).
        backend: of the ops.

    Returns, Raises: as `pair_contrastive`. Gradients: regions, words.
    """
    with distributed.raise_together(regions, words):
        direction = _direction(directions)
    several = several_ranks()
    scores = (distributed.word_region_scores if several else word_region_scores)(
        regions,
        words,
        word_mask=word_mask,
        preset="xmc_gan",
        attention_scale=attention_scale,
        pool_scale=pool_scale,
        scale=scale,
        backend=backend,
    )
    softmax = distributed.info_nce_from_scores if several else info_nce_from_scores
    loss, stats = softmax(scores, direction=direction, return_stats=True, backend=backend)
    return _summed(loss, stats, direction)


def _direction(directions: str) -> str:
    if directions not in DIRECTIONS:
        raise ValueError(f"directions: expected 'both' or 'one', got {directions!r}")
    return "both" if directions == "both" else "x_to_y"


def _inverse(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return 1 / temperature


def _summed(loss: Tensor, stats: object, direction: str) -> tuple[Tensor, dict[str, Tensor]]:
    # the op averages the two directions, these losses add them
    sides = ("x_to_y", "y_to_x") if direction == "both" else (direction,)
    named = {
        kind: sum(getattr(stats, f"{kind}_{side}") for side in sides) / len(sides)
        for kind in ("accuracy", "entropy")
    }
    return len(sides) * loss, named
