"""max_sim_varlen: late interaction between packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, _dispatch
from . import reference
from .op import check_options, fused, operands


def max_sim_varlen(
    regions: Tensor,
    words: Tensor,
    cu_seqlens_regions: Tensor,
    cu_seqlens_words: Tensor,
    *,
    max_seqlen_regions: int | None = None,
    max_seqlen_words: int | None = None,
    reduce: str = "sum",
    direction: str = "words",
    backend: str = "auto",
) -> Tensor:
    """`max_sim` of every image with every caption, both packed without padding.

    Image b has rows cu_seqlens_regions[b] to cu_seqlens_regions[b + 1] of `regions`, caption c likewise of `words`; the equations
    are those of `max_sim`, and a score with an empty image or caption is 0.

    Args:
        regions: [sum of R_b, D], float32, bfloat16 or float16 (float64 on "reference" and "cpu").
        words: [sum of T_c, D], like regions.
        cu_seqlens_regions: int32 or int64 [B + 1], from 0 to the number of rows, not decreasing, on the device of `regions`.
        cu_seqlens_words: int32 or int64 [C + 1], likewise.
        max_seqlen_regions, max_seqlen_words: length of the longest image and caption, or more. None: on a GPU, where looking
            would stop the pipeline, the number of all rows. Give them there: choices then take two bytes, and direction="both"
            one pass where the longest caption or image has at most 128 rows.
        reduce, direction, backend: as in `max_sim`.

    Returns:
        float32 (float64) scores [B, C].

    Raises, Gradients: as in `max_sim`.
    """
    op = "max_sim_varlen"
    sizes: dict[str, int] = {}
    _checks.shaped(op, "regions", regions, "N D", sizes)
    _checks.shaped(op, "words", words, "M D", sizes)
    regions, words = operands(op, regions, words)
    check_options(op, reduce, direction)
    region_offsets, longest_regions = _offsets(op, "regions", cu_seqlens_regions, max_seqlen_regions, regions)
    word_offsets, longest_words = _offsets(op, "words", cu_seqlens_words, max_seqlen_words, words)
    name = _dispatch.select(op, backend, "max_sim", regions)
    if name == "reference":
        return reference.max_sim_varlen(
            regions, words, region_offsets, word_offsets, longest_regions, longest_words, reduce, direction
        )
    return fused(
        regions, words, region_offsets, word_offsets, None, None, longest_regions, longest_words, reduce, direction,
        "exclude", name,
    )  # fmt: skip


def _offsets(op: str, side: str, offsets: Any, longest: int | None, rows: Tensor) -> tuple[Tensor, int]:
    name = f"cu_seqlens_{side}"
    _checks.tensor(op, name, offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{op}: {name} must have shape [sequences + 1], got {list(offsets.shape)}")
    _checks.same_device(op, name, offsets, side, rows)
    offsets = offsets.to(torch.int64)
    lengths = offsets.diff()
    total = rows.shape[0]
    bounded = (offsets[0] == 0) & (offsets[-1] == total) & (lengths >= 0).all()
    _checks.condition(bounded, f"{op}: {name} must rise from 0 to {total}, the number of rows of {side}")
    if longest is not None:
        _checks.integer(op, f"max_seqlen_{side}", longest, 0)
        message = f"{op}: max_seqlen_{side} must be at least the longest sequence, got {longest}"
        _checks.condition((lengths <= longest).all(), message)
        return offsets, longest
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and lengths.numel() > 0:
        return offsets, int(lengths.max())
    return offsets, total
