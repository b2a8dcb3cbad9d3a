"""torch.ops.jrl.max_sim_forward and its backward, over packed sides: schema, kernels' glue, fake implementations, autograd.

The kernels know sums of maxima; what divides them (how many items count, the mean of two directions) is here, on both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import accumulation
from ..._operators import register
from .backends import BACKENDS
from .sides import Side, choice_dtype


class _Problem:
    """The operands of one call, prepared for a backend."""

    def __init__(
        self,
        regions: Tensor,
        words: Tensor,
        region_offsets: Tensor,
        word_offsets: Tensor,
        region_mask: Tensor | None,
        word_mask: Tensor | None,
        longest_regions: int,
        longest_words: int,
        reduce: str,
        direction: str,
        mask_mode: str,
        backend: str,
    ) -> None:
        self.implementation: Any = BACKENDS[backend].load()
        self.dtype = accumulation(regions.dtype)

        def side(rows: Tensor, offsets: Tensor, mask: Tensor | None, longest: int) -> Side:
            mask = None if mask is None else mask.contiguous()
            return Side(self.implementation.prepare(rows), offsets.contiguous(), mask, longest)

        self.regions = side(regions, region_offsets, region_mask, longest_regions)
        self.words = side(words, word_offsets, word_mask, longest_words)
        self.by_word, self.by_region = direction != "regions", direction != "words"
        self.mean = reduce == "mean"
        self.zero = mask_mode == "zero"

    def shares(self, side: Side) -> Tensor:
        """What a sum over the items of each group of `side` is multiplied by, [groups]."""
        part = 0.5 if self.by_word and self.by_region else 1.0
        if not self.mean:
            return torch.full((side.groups,), part, dtype=self.dtype, device=side.rows.device)
        return part / side.counts().clamp(min=1).to(self.dtype)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = _Problem(*arguments)
    regions, words = problem.regions, problem.words
    of_words, of_regions = problem.implementation.forward(
        regions, words, problem.by_word, problem.by_region, problem.zero
    )
    scores = torch.zeros(regions.groups, words.groups, dtype=problem.dtype, device=regions.rows.device)
    if of_words is not None:
        scores += of_words.sums * problem.shares(words)
    if of_regions is not None:
        scores += (of_regions.sums * problem.shares(regions)).T
    nothing = torch.empty(0, dtype=torch.int16, device=regions.rows.device)
    return (
        scores,
        nothing if of_words is None else of_words.choice,
        nothing.clone() if of_regions is None else of_regions.choice,
    )


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    *inputs, region_choice, word_choice, wanted = arguments[:-6]
    problem = _Problem(*inputs, *arguments[-6:])
    regions, words = problem.regions, problem.words
    wanted_regions, wanted_words = wanted
    d_regions: Tensor | None = None
    d_words: Tensor | None = None
    if problem.by_word:
        upstream = (grad * problem.shares(words)).contiguous()
        d_words, d_regions = problem.implementation.backward(
            words, regions, region_choice, upstream, wanted_words, wanted_regions
        )
    if problem.by_region:
        upstream = (grad.T * problem.shares(regions)).contiguous()
        items, searched = problem.implementation.backward(
            regions, words, word_choice, upstream, wanted_regions, wanted_words
        )
        d_regions = items if d_regions is None else d_regions + items
        d_words = searched if d_words is None else d_words + searched
    return d_regions, d_words


def _forward_fake(
    regions: Tensor,
    words: Tensor,
    region_offsets: Tensor,
    word_offsets: Tensor,
    region_mask: Tensor | None,
    word_mask: Tensor | None,
    longest_regions: int,
    longest_words: int,
    reduce: str,
    direction: str,
    mask_mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    images, captions = region_offsets.shape[0] - 1, word_offsets.shape[0] - 1
    nothing = regions.new_empty(0, dtype=torch.int16)
    region_choice = regions.new_empty(images, words.shape[0], dtype=choice_dtype(longest_regions))
    word_choice = regions.new_empty(captions, regions.shape[0], dtype=choice_dtype(longest_words))
    return (
        regions.new_empty(images, captions, dtype=accumulation(regions.dtype)),
        nothing if direction == "regions" else region_choice,
        torch.empty_like(nothing) if direction == "words" else word_choice,
    )


register(
    "max_sim",
    inputs="Tensor regions, Tensor words, Tensor region_offsets, Tensor word_offsets, Tensor? region_mask, Tensor? word_mask",
    options="SymInt longest_regions, SymInt longest_words, str reduce, str direction, str mask_mode, str backend",
    outputs=("scores", "region_choice", "word_choice"),
    gradients=("regions", "words"),
    forward=_forward,
    fake=_forward_fake,
    backward=_backward,
)
