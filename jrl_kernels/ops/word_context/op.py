"""word_context: what the words of a caption say about each region of its image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _checks, _dispatch
from . import attention, reference
from .backends import BACKENDS as BACKENDS


def word_context(
    regions: Tensor,
    words: Tensor,
    *,
    word_mask: Tensor | None = None,
    attention_scale: float | Tensor = 15.0,
    return_attention: bool = False,
    backend: str = "auto",
) -> Any:
    """The context of every region: its attention over the words of its own caption.

    With unit vectors r', w' (norms of at least 1e-12)::

        alpha_bjt = softmax over the words t that count of attention_scale * r'_bj . w'_bt
        context_bj = sum_t alpha_bjt w'_bt

    Source: Zhang et al. 2021 (XMC-GAN), attention_for_g of its code. Here a caption without words gives a context of exactly 0
    and no gradient, where the code averages its padding.

    Args:
        regions: [B, R, D], float32, bfloat16, float16 or float64.
        words: [B, T, D], like regions.
        word_mask: bool [B, T], True for words that count; None for all.
        attention_scale: inverse temperature, a number or a 0-d tensor (with gradient).
        return_attention: also return alpha; it is then stored, and every backend computes the formula of "reference".
        backend: "auto", "reference", "cpu" or "cuda"; the last two are torch.nn.functional.scaled_dot_product_attention, on a CPU
            once there are more than D / 4 words.

    Returns:
        Contexts [B, R, D] in the dtype of `regions` (under autocast, in its dtype), computed in float32 or wider; with
        return_attention a pair with alpha [B, R, T], float32 (float64).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here.

    Gradients: regions, words, attention_scale; twice differentiable with backend="reference" or return_attention. PyTorch's
    fused attention may raise where its backward is differentiated.
    """
    op = "word_context"
    sizes: dict[str, int] = {}
    _checks.shaped(op, "regions", regions, "B R D", sizes)
    _checks.shaped(op, "words", words, "B T D", sizes)
    _checks.same_device(op, "words", words, "regions", regions)
    regions, words = _checks.autocast(regions, words)  # type: ignore[assignment]
    _checks.same_dtype(op, "words", words, "regions", regions)
    if word_mask is not None:
        _checks.mask(op, "word_mask", word_mask, "B T", sizes, "regions", regions)
    scale = _checks.scalar(op, "attention_scale", attention_scale, "regions", regions)
    name = _dispatch.select(op, backend, "word_context", regions)
    if name == "reference" or return_attention:
        context, alpha = reference.word_context(regions, words, word_mask, scale)
        context = context.to(regions.dtype)
        return (context, alpha) if return_attention else context
    # Not through the table, whose import a compiler cannot trace: both entries name this module.
    return attention.word_context(regions, words, word_mask, scale).to(regions.dtype)
