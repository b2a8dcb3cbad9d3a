"""Retrieval in both directions, with several captions a picture, without the full matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import jrl_kernels


@dataclass
class RetrievalRanks:
    """0-based ranks of the best-placed positive.

    Attributes:
        image_to_text: [N] int64, of each picture among all captions; its own other captions do not count.
        text_to_image: [C] int64, of each caption among all pictures.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def retrieval_ranks(image: Tensor, text: Tensor, caption_image: Tensor | None = None) -> RetrievalRanks:
    """Exact ranks of the right answer by dot product; ties, and scores that are NaN, count against it.

    rank_i = #{j not a positive of i: s_ij ≥ max over positives p of s_ip}

    Args:
        image: [N, D] float, of unit length for a cosine.
        text: [C, D] float.
        caption_image: [C] int64, the picture of each caption; caption i belongs to picture i when None.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes do not fit, an index is out of range, or a picture has no caption.
    """
    caption_image = _checked(image, text, caption_image)
    pictures = torch.arange(len(image), device=image.device)
    return RetrievalRanks(
        jrl_kernels.retrieval_ranks(image, text, positives=(pictures, caption_image), metric="dot"),
        jrl_kernels.retrieval_ranks(text, image, positives=(caption_image, pictures), metric="dot"),
    )


def retrieval_metrics(ranks: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k, median rank floor(median(rank)) + 1 and mean rank mean(rank) + 1.

    Args:
        ranks: [N] 0-based ranks.
        ks: cut-offs.

    Raises:
        ValueError: `ranks` is empty.
    """
    if not ranks.numel():
        raise ValueError("ranks: expected at least one, got none")
    ranks = ranks.double()
    metrics = {f"r{k}": float((ranks < k).double().mean()) for k in ks}
    # quantile averages the two middle ranks of an even number, Tensor.median takes the lower
    metrics["median_rank"] = (
        float(ranks.sort().values[[(len(ranks) - 1) // 2, len(ranks) // 2]].mean().floor()) + 1
    )
    metrics["mean_rank"] = float(ranks.mean()) + 1
    return metrics


def chance_recall(k: int, candidates: int, positives: int = 1) -> float:
    """Probability that one of `positives` among `candidates` is in the first k of a random order.

    1 − C(N − P, k) / C(N, k)

    Raises:
        ValueError: a value out of range.
    """
    if k < 1 or not 1 <= positives <= candidates:
        raise ValueError(f"expected k ≥ 1 and 1 ≤ positives ≤ candidates, got {k}, {positives}, {candidates}")
    missed = 1.0
    for drawn in range(min(k, candidates)):
        missed *= max(0, candidates - positives - drawn) / (candidates - drawn)
    return 1.0 - missed


def _checked(image: Tensor, text: Tensor, caption_image: Tensor | None) -> Tensor:
    for name, value in (("image", image), ("text", text)):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
        if value.ndim != 2 or not len(value):
            raise ValueError(f"{name}: expected [rows, D] with at least one row, got {list(value.shape)}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"text: expected width {image.shape[1]} as image, got {text.shape[1]}")
    if caption_image is None:
        if len(image) != len(text):
            raise ValueError(f"caption_image: needed where {len(text)} captions meet {len(image)} pictures")
        return torch.arange(len(text), device=text.device)
    if caption_image.dtype != torch.int64:
        raise TypeError(f"caption_image: expected int64, got {caption_image.dtype}")
    if caption_image.shape != (len(text),):
        raise ValueError(f"caption_image: expected [{len(text)}], got {list(caption_image.shape)}")
    caption_image = caption_image.to(image.device)
    if int(caption_image.min()) < 0 or int(caption_image.max()) >= len(image):
        raise ValueError(f"caption_image: expected values in [0, {len(image)})")
    counts = torch.bincount(caption_image, minlength=len(image))
    if int(counts.min()) == 0:
        raise ValueError(f"caption_image: picture {int(counts.argmin())} has no caption")
    return caption_image
