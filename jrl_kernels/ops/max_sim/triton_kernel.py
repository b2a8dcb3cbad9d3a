"""The Triton backend: launches the kernels of triton_forward and triton_backward on NVIDIA GPUs.

No launch reads the GPU's memory or depends on what it holds, so every function here can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ... import _dispatch, _triton
from .sides import Picks, Side, choice_dtype
from .triton_backward import max_sim_found_kernel, max_sim_items_kernel
from .triton_forward import max_sim_forward_kernel


class Tile(NamedTuple):
    """How a matrix kernel cuts the problem."""

    y: int
    x: int
    depth: int  # of one piece, where the whole does not fit
    warps: int
    stages: int


# By what multiplies (_triton.precision), compute capability (_triton.architecture) and the work on each similarity, since what it
# keeps in registers must not spill: "one" direction picks, the same of a "deep" problem, which comes in pieces, or "both" pick,
# and then all items of a group of y are in one tile.
TILES = {
    ("half", 8, "one"): Tile(64, 128, 32, 4, 2),
    ("half", 9, "one"): Tile(64, 128, 64, 4, 2),
    ("half", 10, "one"): Tile(128, 32, 64, 8, 2),
    ("half", 8, "deep"): Tile(128, 64, 32, 8, 3),
    ("half", 9, "deep"): Tile(128, 64, 64, 8, 3),
    ("half", 10, "deep"): Tile(128, 64, 64, 8, 3),
    ("half", 8, "both"): Tile(128, 64, 32, 8, 2),
    ("half", 9, "both"): Tile(128, 64, 64, 8, 2),
    ("half", 10, "both"): Tile(128, 32, 64, 8, 2),
    **{("tf32", major, work): Tile(64, 32, 32, 4, 2) for major in (8, 9) for work in ("one", "deep")},
    **{("tf32", 10, work): Tile(64, 32, 32, 8, 2) for work in ("one", "deep")},
    **{("tf32", major, "both"): Tile(128, 32, 32, 8, 2) for major in (8, 9, 10)},
    **{("ieee", major, "deep"): Tile(64, 32, 16, 8, 2) for major in (8, 9, 10)},
    **{("ieee", major, "both"): Tile(128, 16, 16, 16, 2) for major in (8, 9, 10)},
}
WHOLE_DEPTH = {"half": 128, "tf32": 64, "ieee": 0}
# Where rows do not begin at multiples of 16 elements, every element has an address of its own.
UNALIGNED = {"deep": Tile(64, 32, 16, 8, 2), "both": Tile(128, 16, 16, 8, 2)}
ALIGNMENT = 16
INTERPRETER_TILE = Tile(16, 16, 16, 1, 1)
GROUP = 8
# Few items of many groups at a time: little padding, and a long loop over which the other side's tile stays.
WIDTH = 8
INTERPRETER_WIDTH = 4
# Of a tile for both directions, lest every group's choices need addresses of their own.
MOST_GROUPS = 8
ITEMS = {"BLOCK_N": 16, "BLOCK_D": 128, "UNROLL": 4, "num_warps": 4}
INTERPRETER_ITEMS = {"BLOCK_N": 16, "BLOCK_D": 16, "UNROLL": 2, "num_warps": 1}
FOUND = {
    "half": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    "ieee": {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2},
}
UNALIGNED_FOUND = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2}
INTERPRETER_FOUND = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 16, "num_warps": 1, "num_stages": 1}
# float16 gradients are rounded in units of their largest over this, and lose bits below 2**-28 of it.
FLOAT16_TOP = 2.0**14


def prepare(tensor: Tensor) -> Tensor:
    """Matrix operands as they are, rows contiguous."""
    return tensor.contiguous()


def _tile(side: Side, both: bool) -> tuple[Tile, bool]:
    """How to cut a problem, and whether its depth is one piece."""
    depth = side.rows.shape[1]
    if _dispatch.interpreting():
        return INTERPRETER_TILE, depth <= INTERPRETER_TILE.depth
    kind = _triton.precision(side.rows.dtype)
    if depth % ALIGNMENT != 0 and kind != "ieee":
        return UNALIGNED["both" if both else "deep"], False
    whole = depth <= WHOLE_DEPTH[kind]
    work = "both" if both else "one" if whole else "deep"
    return TILES[kind, _triton.architecture(side.rows.device), work], whole


def _input_precision(side: Side) -> str:
    return "tf32" if _triton.precision(side.rows.dtype) == "tf32" else "ieee"


def _empty_picks(searched: Side, items: Side) -> Picks:
    device, rows = items.rows.device, items.rows.shape[0]
    sums = torch.empty(searched.groups, items.groups, dtype=torch.float32, device=device)
    choice = torch.empty(searched.groups, rows, dtype=choice_dtype(searched.longest), device=device)
    if 0 in (searched.groups, items.groups, rows, searched.rows.shape[0]):
        sums.zero_()
        choice.fill_(-1)
    return Picks(sums, choice)


def forward(
    regions: Side, words: Side, by_word: bool, by_region: bool, zero: bool
) -> tuple[Picks | None, Picks | None]:
    """What the words pick of every image, and the regions of every caption."""
    with torch.cuda.device_of(regions.rows):
        if not by_region:
            return _sweep(regions, words, True, False, zero)
        if not by_word:
            return _sweep(words, regions, True, False, zero)[::-1]
        single = _tile(regions, True)[0].y
        if words.longest <= single:
            return _sweep(regions, words, True, True, zero)
        if regions.longest <= single:
            return _sweep(words, regions, True, True, zero)[::-1]
        # Neither side's maxima would be final within one program: a product for each direction.
        of_words, _ = _sweep(regions, words, True, False, zero)
        of_regions, _ = _sweep(words, regions, True, False, zero)
        return of_words, of_regions


def _sweep(x: Side, y: Side, y_picks: bool, x_picks: bool, zero: bool) -> tuple[Picks | None, Picks | None]:
    """What y's items pick of every group of x, and x's of every group of y."""
    of_y = _empty_picks(x, y) if y_picks else None
    of_x = _empty_picks(y, x) if x_picks else None
    if 0 in (x.groups, y.groups, x.rows.shape[0], y.rows.shape[0]):
        return of_y, of_x
    tile, whole = _tile(x, x_picks)
    depth = x.rows.shape[1]
    block = max(16, triton.next_power_of_2(depth)) if whole else tile.depth
    longest = min(tile.y, triton.next_power_of_2(y.longest))
    if x_picks:
        width = max(longest, tile.y // MOST_GROUPS)
    else:
        width = min(longest, INTERPRETER_WIDTH if _dispatch.interpreting() else WIDTH)
    groups = tile.y // width
    max_sim_forward_kernel[(x.groups * triton.cdiv(y.groups, groups),)](
        x_ptr=x.rows,
        y_ptr=y.rows,
        x_offsets_ptr=x.offsets,
        y_offsets_ptr=y.offsets,
        x_mask_ptr=x.mask,
        y_mask_ptr=y.mask,
        y_sums_ptr=None if of_y is None else of_y.sums,
        x_choice_ptr=None if of_y is None else of_y.choice,
        x_sums_ptr=None if of_x is None else of_x.sums,
        y_choice_ptr=None if of_x is None else of_x.choice,
        x_groups=x.groups,
        y_groups=y.groups,
        x_rows=x.rows.shape[0],
        y_rows=y.rows.shape[0],
        depth=depth,
        Y_PICKS=y_picks,
        X_PICKS=x_picks,
        X_MASK=x.mask is not None,
        Y_MASK=y.mask is not None,
        ZERO=zero,
        ONE_X=x.longest <= tile.x,
        WHOLE_D=whole,
        EVEN_D=depth % block == 0,
        PRECISION=_input_precision(x),
        BLOCK_X=tile.x,
        BLOCK_Y=tile.y,
        BLOCK_D=block,
        GROUPS=groups,
        GROUP=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return of_y, of_x


def backward(
    items: Side, searched: Side, choice: Tensor, grad: Tensor, wanted_items: bool, wanted_searched: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows that searched and of the rows that were found; `grad` [groups searched, groups of items]."""
    rows, depth = items.rows.shape
    nothing = 0 in (rows, depth, items.groups, searched.groups, searched.rows.shape[0])

    def zeros(side: Side) -> Tensor:
        make = torch.zeros if nothing else torch.empty
        return make(side.rows.shape, dtype=torch.float32, device=side.rows.device)

    d_items = zeros(items) if wanted_items else None
    d_searched = zeros(searched) if wanted_searched else None
    if nothing:
        return d_items, d_searched
    shared = {
        "found_offsets_ptr": searched.offsets,
        "choice_ptr": choice.contiguous(),
        "grad_ptr": grad,
        "owner_ptr": items.group_of_row(),
        "items": rows,
        "groups": items.groups,
        "depth": depth,
    }
    with torch.cuda.device_of(items.rows):
        if d_items is not None:
            meta = INTERPRETER_ITEMS if _dispatch.interpreting() else ITEMS
            grid = triton.cdiv(rows, meta["BLOCK_N"]), triton.cdiv(depth, meta["BLOCK_D"])
            max_sim_items_kernel[grid](
                found_ptr=searched.rows, out_ptr=d_items, searched=searched.groups, **shared, **meta
            )
        if d_searched is not None:
            _found_gradient(items, searched, grad, d_searched, shared)
    return d_items, d_searched


def _found_gradient(
    items: Side, searched: Side, grad: Tensor, out: Tensor, shared: dict[str, object]
) -> None:
    depth = items.rows.shape[1]
    if _dispatch.interpreting():
        meta = INTERPRETER_FOUND
    elif depth % ALIGNMENT != 0:
        meta = UNALIGNED_FOUND
    else:
        meta = FOUND[_triton.precision(items.rows.dtype)]
    unit = None
    if items.rows.dtype == torch.float16:
        top = grad.abs().nan_to_num(0.0, 0.0, 0.0).amax()
        unit = torch.where(top > 0, top / FLOAT16_TOP, 1.0)
    tiles = triton.cdiv(min(searched.longest, searched.rows.shape[0]), meta["BLOCK_M"])
    max_sim_found_kernel[(searched.groups * tiles, triton.cdiv(depth, meta["BLOCK_D"]))](
        items_ptr=items.rows,
        found_mask_ptr=searched.mask,
        unit_ptr=unit,
        out_ptr=out,
        tiles=tiles,
        MASK=searched.mask is not None,
        UNIT=unit is not None,
        EVEN_D=depth % meta["BLOCK_D"] == 0,
        PRECISION=_input_precision(items),
        **shared,
        **meta,
    )
