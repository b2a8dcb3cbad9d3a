"""Golden values of word-region attention: numbers of the original codes and of the documents' formulas, by case."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import attention_critic, info_nce_from_scores, word_region_scores
from tests.ops.conformance import det

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
PRINTED = 1e-8
"""Matrices are recorded to eight decimals."""

Case = Callable[[str, str, torch.dtype], tuple[Tensor, Any]]


def regions() -> Tensor:
    return det(3, 4, 5, a=0.37)


def words() -> Tensor:
    return det(3, 6, 5, a=0.53)


def mask() -> Tensor:
    return torch.arange(6) < torch.tensor([6, 4, 2])[:, None]


def scores(
    backend: str,
    device: str,
    dtype: torch.dtype,
    r: Tensor | None = None,
    w: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r, w = regions() if r is None else r, words() if w is None else w
    return word_region_scores(
        r.to(device, dtype), w.to(device, dtype), word_mask=mask().to(device), backend=backend, **options
    )


def cross_entropies(s: Tensor) -> tuple[Tensor, Tensor]:
    target = torch.arange(s.shape[0], device=s.device)
    return F.cross_entropy(s, target), F.cross_entropy(s.T, target)


def xmc_gan(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    return scores(backend, device, dtype, preset="xmc_gan", scale=1.0), [
        [1.30901894, 1.21563871, 1.09977172],
        [1.27689555, 1.21448491, 1.11274894],
        [1.30769449, 1.21276758, 1.0994771],
    ]


def xmc_gan_loss(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """The code adds the two directions."""
    losses = [
        2 * info_nce_from_scores(scores(backend, device, dtype, preset="xmc_gan", **options), backend=backend)
        for options in ({}, {"scale": 10.0})
    ]
    return torch.stack(losses), [5.6061440583, 2.4413212982]


def damsm(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    image = det(3, 5, 2, 2, a=0.37).flatten(2).transpose(1, 2)
    caption = det(3, 5, 6, a=0.53).transpose(1, 2)
    s = scores(backend, device, dtype, image, caption, preset="damsm")
    return torch.stack(cross_entropies(s)), [14.4189347244, 8.9314746839]


def scan_t2i(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    return scores(backend, device, dtype, preset="scan_t2i"), [
        [1.21491621, 1.15782077, 1.07749928],
        [1.22012316, 1.09911988, 1.07215921],
        [1.22574044, 1.09046595, 1.05478274],
    ]


def scan_i2t(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    s = scores(backend, device, dtype, preset="scan_i2t", attention_scale=9.0, pool_scale=6.0)
    return s, [
        [1.17817155, 1.16850717, 1.0458157],
        [1.18339372, 1.11651214, 1.13735677],
        [1.17380512, 1.1066354, 1.05121793],
    ]


def scan_hinges(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Margin 0.2 on the text-to-image scores, all negatives and the hardest."""
    s = scores(backend, device, dtype, preset="scan_t2i")
    own = s.diagonal()
    negative = ~torch.eye(3, dtype=torch.bool, device=device)
    captions, images = (((0.2 + s - t).clamp(min=0) * negative) for t in (own[:, None], own[None]))
    hardest = captions.amax(1).sum() + images.amax(0).sum()
    return torch.stack([captions.sum() + images.sum(), hardest]), [2.6123422865, 1.5271071940]


CRITIC = [
    [10.59313906, 9.20549071, 5.16173833],
    [11.66299637, 8.16229026, 5.32996377],
    [9.90282358, 7.64962846, 4.34428544],
]


def critic(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    r, w = regions().to(device, dtype), words().to(device, dtype)
    return attention_critic(r, r, w, w, word_mask=mask().to(device), backend=backend), CRITIC


def mutual_information(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    return scores(backend, device, dtype, preset="mutual_information"), CRITIC


def critic_bounds(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """I_NCE = log N - loss, over rows and over columns."""
    s = scores(backend, device, dtype, preset="mutual_information")
    return torch.stack([math.log(3.0) - loss for loss in cross_entropies(s)]), [
        -2.0415379145,
        -0.4873152606,
    ]


def info_ground(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Each word of a caption chooses its image among all: mean over captions of the mean over words.

    The code divides by a float32 square root of D, which the tenth decimal shows.
    """
    root = float(torch.tensor(5.0).sqrt())
    logits = scores(backend, device, dtype, preset="info_ground", attention_scale=1 / root)
    own = torch.log_softmax(logits, 0).diagonal().T  # [C, T]
    valid = mask().to(device)
    per_caption = (own * valid).sum(1) / (valid.sum(1).to(dtype) + 1e-6)
    return -per_caption.mean(), 1.2270099764


def dvsa(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    return scores(backend, device, dtype, preset="dvsa"), [
        [12.74680145, 10.33750721, 5.76387411],
        [13.72352479, 9.33008119, 5.75864809],
        [12.27860086, 8.92894857, 4.95169404],
    ]


def dvsa_loss(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    s = scores(backend, device, dtype, preset="dvsa")
    own, negative = s.diagonal(), ~torch.eye(3, dtype=torch.bool, device=device)
    hinges = [((1 + s - t).clamp(min=0) * negative).sum() for t in (own[:, None], own[None])]
    return hinges[0] + hinges[1], 27.4315552325


CASES: tuple[Case, ...] = (
    xmc_gan, xmc_gan_loss, damsm, scan_t2i, scan_i2t, scan_hinges, critic, mutual_information, critic_bounds,
    info_ground, dvsa, dvsa_loss,
)  # fmt: skip


def check(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    found, golden = case(backend, device, dtype)
    golden = torch.tensor(golden, dtype=torch.float64)
    absolute = PRINTED if golden.dim() == 2 else 0.0
    torch.testing.assert_close(found.double().cpu(), golden, rtol=TOLERANCE[dtype], atol=absolute)
