"""The CPU backend: a BLAS fills the similarities of some images and some captions, C++ loops of the extension visit them."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _extension
from ..._checks import accumulation
from ..._extension import pointer
from .sides import Picks, Side, choice_dtype

ROWS = 256
ENTRIES = 1 << 19
"""A tile has about so many regions and similarities, if one image and one caption have no more."""


def prepare(tensor: Tensor) -> Tensor:
    """Matrix operands in the dtype that the tiles are computed in, rows contiguous."""
    return tensor.to(accumulation(tensor.dtype)).contiguous()


def _launch(name: str, dtype: torch.dtype, *arguments: int) -> None:
    _extension.launch(f"{name}_{'f64' if dtype == torch.float64 else 'f32'}_cpu", *arguments)


def _blocks(offsets: list[int], rows: int) -> list[tuple[int, int]]:
    """Runs of groups with at most `rows` rows together, or of one group."""
    found = []
    first = 0
    for group in range(1, len(offsets)):
        if group == len(offsets) - 1 or offsets[group + 1] - offsets[first] > rows:
            found.append((first, group))
            first = group
    return found


def _empty_picks(searched: Side, items: Side) -> Picks:
    sums = torch.empty(searched.groups, items.groups, dtype=items.rows.dtype)
    choice = torch.empty(searched.groups, items.rows.shape[0], dtype=choice_dtype(searched.longest))
    return Picks(sums, choice)


def _pick_pointers(picks: Picks | None) -> tuple[int, int, bool]:
    if picks is None:
        return 0, 0, False
    return pointer(picks.sums), pointer(picks.choice), picks.choice.dtype == torch.int32


def forward(
    regions: Side, words: Side, by_word: bool, by_region: bool, zero: bool
) -> tuple[Picks | None, Picks | None]:
    """What the words pick of every image, and the regions of every caption."""
    of_words = _empty_picks(regions, words) if by_word else None
    of_regions = _empty_picks(words, regions) if by_region else None
    region_at, word_at = regions.offsets.tolist(), words.offsets.tolist()
    dtype = regions.rows.dtype
    image_blocks = _blocks(region_at, ROWS)
    tallest = max((region_at[end] - region_at[start] for start, end in image_blocks), default=0)
    caption_blocks = _blocks(word_at, ENTRIES // max(1, tallest))
    widest = max((word_at[end] - word_at[start] for start, end in caption_blocks), default=0)
    buffer = torch.empty(tallest * widest, dtype=dtype)
    for b0, b1 in image_blocks:
        image_rows = regions.rows[region_at[b0] : region_at[b1]]
        for c0, c1 in caption_blocks:
            caption_rows = words.rows[word_at[c0] : word_at[c1]]
            shape = image_rows.shape[0], caption_rows.shape[0]
            tile = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(image_rows, caption_rows.T, out=tile)
            _launch(
                "max_sim_forward", dtype, pointer(tile), b0, b1 - b0, c0, c1 - c0, regions.groups, words.groups,
                pointer(regions.offsets, b0), pointer(words.offsets, c0), pointer(regions.mask), pointer(words.mask),
                regions.rows.shape[0], words.rows.shape[0], zero, *_pick_pointers(of_words), *_pick_pointers(of_regions),
            )  # fmt: skip
    return of_words, of_regions


def backward(
    items: Side, searched: Side, choice: Tensor, grad: Tensor, wanted_items: bool, wanted_searched: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows that searched and of the rows that were found; `grad` [groups searched, groups of items]."""
    d_items = torch.zeros_like(items.rows) if wanted_items else None
    d_searched = torch.zeros_like(searched.rows) if wanted_searched else None
    owner = items.group_of_row()
    choice = choice.contiguous()
    _launch(
        "max_sim_backward", items.rows.dtype, pointer(items.rows), pointer(searched.rows), *items.rows.shape,
        pointer(owner), items.groups, pointer(searched.offsets), searched.groups, pointer(grad), pointer(choice),
        choice.dtype == torch.int32, pointer(d_items), pointer(d_searched),
    )  # fmt: skip
    return d_items, d_searched
