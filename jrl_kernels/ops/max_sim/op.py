"""max_sim: late interaction between padded regions and words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, _dispatch
from . import autograd, reference  # noqa: F401  (autograd registers torch.ops.jrl.max_sim_*)
from .backends import BACKENDS as BACKENDS

REDUCTIONS = ("sum", "mean")
DIRECTIONS = ("words", "regions", "both")
MASK_MODES = ("exclude", "zero")


def max_sim(
    regions: Tensor,
    words: Tensor,
    *,
    region_mask: Tensor | None = None,
    word_mask: Tensor | None = None,
    reduce: str = "sum",
    direction: str = "words",
    mask_mode: str = "exclude",
    backend: str = "auto",
) -> Tensor:
    """Late interaction (ColBERT's MaxSim, FILIP) of every image with every caption; no tensor of similarities is stored.

    With s_bctr = w_ct . r_br, the mask of the items that count m and T_c, R_b how many of them there are::

        S_bc = sum_t m_ct max_r s_bctr                        direction="words": every word picks a region
        S_bc = sum_r m_br max_t s_bctr                        direction="regions": every region picks a word
        S_bc = the mean of the two                            direction="both"

    and with reduce="mean" the sums divided by T_c, R_b (FILIP is direction="both", reduce="mean"). Sources: Khattab & Zaharia
    2020 (ColBERT); Yao et al. 2022 (FILIP); Karpathy & Fei-Fei 2015 (DVSA's alignment is "words", "sum"). The inputs are used as
    they are: normalise them for cosines. Of several equal maxima the first takes the gradient. Unlike eager code, memory is
    O((B R + C T) D) and a choice of 2 (4) bytes for each word and image.

    Args:
        regions: [B, R, D], float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        words: [C, T, D], like regions.
        region_mask: bool [B, R], True for regions that count; None for all.
        word_mask: bool [C, T], True for words that count; None for all.
        reduce: "sum" or "mean" over the items that count; of no items both are 0.
        direction: "words", "regions" or "both".
        mask_mode: what a masked item is on the side that is searched. "exclude": never chosen, and where all are masked the
            item that searches contributes nothing. "zero": of similarity 0, as if multiplied by 0 (PyLate), without gradient.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        float32 (float64) scores [B, C]; maxima and their sums are never rounded below float32.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        NotImplementedError: no backend takes these tensors here; a second derivative of a fused backward was asked for.

    Gradients: regions, words; once differentiable, twice with backend="reference".
    """
    op = "max_sim"
    sizes: dict[str, int] = {}
    _checks.shaped(op, "regions", regions, "B R D", sizes)
    _checks.shaped(op, "words", words, "C T D", sizes)
    regions, words = operands(op, regions, words)
    if region_mask is not None:
        _checks.mask(op, "region_mask", region_mask, "B R", sizes, "regions", regions)
    if word_mask is not None:
        _checks.mask(op, "word_mask", word_mask, "C T", sizes, "regions", regions)
    check_options(op, reduce, direction)
    _checks.choice(op, "mask_mode", mask_mode, MASK_MODES)
    name = _dispatch.select(op, backend, "max_sim", regions)
    if name == "reference":
        return reference.max_sim(regions, words, region_mask, word_mask, reduce, direction, mask_mode)

    def packed(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        groups, length, width = rows.shape
        offsets = torch.arange(groups + 1, device=rows.device) * length
        count = groups * length
        return rows.reshape(count, width), offsets, None if mask is None else mask.reshape(count)

    packed_regions, region_offsets, packed_region_mask = packed(regions, region_mask)
    packed_words, word_offsets, packed_word_mask = packed(words, word_mask)
    return fused(
        packed_regions, packed_words, region_offsets, word_offsets, packed_region_mask, packed_word_mask,
        sizes["R"], sizes["T"], reduce, direction, mask_mode, name,
    )  # fmt: skip


def operands(op: str, regions: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The two sides on one device, in the dtype that autocast asks for, if any, and in the same one."""
    _checks.same_device(op, "words", words, "regions", regions)
    regions, words = _checks.autocast(regions, words)  # type: ignore[assignment]
    _checks.same_dtype(op, "words", words, "regions", regions)
    return regions, words


def check_options(op: str, reduce: str, direction: str) -> None:
    _checks.choice(op, "reduce", reduce, REDUCTIONS)
    _checks.choice(op, "direction", direction, DIRECTIONS)


def fused(*arguments: Any) -> Tensor:
    scores: Tensor = torch.ops.jrl.max_sim_forward(*arguments)[0]
    return scores
