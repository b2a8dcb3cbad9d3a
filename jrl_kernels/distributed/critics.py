"""Scores of this rank's images with all ranks' captions, by the critics over regions and words."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ..ops.max_sim import max_sim as local_max_sim
from ..ops.word_region import word_region_scores as local_word_region_scores
from .ranks import Ranks, gather_rows


def max_sim(
    regions: Tensor,
    words: Tensor,
    *,
    word_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """`jrl_kernels.max_sim` of this rank's images with the captions of all ranks, for `info_nce_from_scores` of this module.

    Args:
        regions: [b, R, D], this rank's.
        words: [b, T, D], this rank's; T may differ between ranks.
        word_mask: bool [b, T], True = valid; None = all.
        group: the process group; the default one when None.
        options: as in `jrl_kernels.max_sim`.

    Returns:
        [b, C], C captions of all ranks in the order of ranks.

    Raises: as `jrl_kernels.max_sim` and `info_nce` of this module.

    Gradients: regions, words; what other ranks' scores say of this rank's words arrives in the backward.
    """
    words, word_mask = _all_words("distributed.max_sim", words, word_mask, group)
    return local_max_sim(regions, words, word_mask=word_mask, **options)


def word_region_scores(
    regions: Tensor,
    words: Tensor,
    *,
    word_values: Tensor | None = None,
    word_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """`jrl_kernels.word_region_scores` of this rank's images with the captions of all ranks, for `info_nce_from_scores`.

    Args:
        regions: [b, R, D], this rank's.
        words: [b, T, D], this rank's; T may differ between ranks.
        word_values: [b, T, E]; None = the words.
        word_mask: bool [b, T], True = valid; None = all.
        group: the process group; the default one when None.
        options: as in `jrl_kernels.word_region_scores`; region_values and region_mask are this rank's.

    Returns, Raises, Gradients: as `max_sim` of this module; those of `jrl_kernels.word_region_scores` besides.
    """
    op = "distributed.word_region_scores"
    everybody, mask = _all_words(op, words, word_mask, group, word_values is None)
    values = None if word_values is None else _all_words(op, word_values, word_mask, group)[0]
    return local_word_region_scores(regions, everybody, word_values=values, word_mask=mask, **options)


def _all_words(
    op: str, words: Tensor, word_mask: Tensor | None, group: dist.ProcessGroup | None, *options: Any
) -> tuple[Tensor, Tensor | None]:
    """Words [C, T, D] and their mask [C, T] of all ranks, T the longest."""
    sizes: dict[str, int] = {}
    _checks.shaped(op, "words", words, "b T D", sizes)
    if word_mask is not None:
        _checks.mask(op, "word_mask", word_mask, "b T", sizes, "words", words)
    # ranks pad their captions to lengths of their own: what they must agree in is the width and the dtype
    ranks = Ranks(
        op, words.new_empty(words.shape[0], words.shape[2]), (word_mask is None, *options), group, even=False
    )
    lengths = ranks.stack(torch.tensor(words.shape[1], device=words.device)).tolist()
    longest = max(lengths)
    if word_mask is None and min(lengths) < longest:
        word_mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
    missing = longest - words.shape[1]
    words = gather_rows(F.pad(words, (0, 0, 0, missing)), ranks)
    return words, None if word_mask is None else ranks.gather(F.pad(word_mask, (0, missing)))
