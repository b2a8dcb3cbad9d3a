"""Triton kernels of late interaction's backward: every gradient is summed by one program in a fixed order, without atomics."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def max_sim_items_kernel(
    found_ptr, found_offsets_ptr, choice_ptr, grad_ptr, owner_ptr, out_ptr, items, groups, searched, depth,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradient of item n: the sum over the searched groups h of grad[h, owner[n]] times the row of h that n chose."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = n < items
    owner = tl.load(owner_ptr + n, mask=inside, other=0)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, searched, UNROLL):
        for i in tl.static_range(UNROLL):
            h = tl.cast(first, tl.int64) + i
            place = tl.load(choice_ptr + h * items + n, mask=inside & (h < searched), other=-1).to(tl.int64)
            chosen = place >= 0
            start = tl.load(found_offsets_ptr + tl.minimum(h, searched - 1))
            grad = tl.load(grad_ptr + h * groups + owner, mask=chosen, other=0.0)
            row = tl.load(
                found_ptr + (start + place)[:, None] * depth + d[None, :],
                mask=chosen[:, None] & (d < depth)[None, :],
                other=0.0,
            )
            total += grad[:, None] * row.to(tl.float32)
    tl.store(out_ptr + n[:, None] * depth + d[None, :], total, mask=inside[:, None] & (d < depth)[None, :])


@triton.jit
def max_sim_found_kernel(
    items_ptr, found_offsets_ptr, found_mask_ptr, choice_ptr, grad_ptr, owner_ptr, unit_ptr, out_ptr,
    items, groups, tiles, depth,
    MASK: tl.constexpr, UNIT: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows of one searched group: the sum over the items that chose each, as a product with their choices.

    The one-hot matrix of the choices, times the upstream gradient (in units of `unit` where UNIT), is made in registers.
    """
    h = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(found_offsets_ptr + h)
    end = tl.load(found_offsets_ptr + h + 1)
    if start + tl.program_id(0) % tiles * BLOCK_M >= end:
        return
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, items, BLOCK_N):
        n = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_N)
        inside = n < items
        place = tl.load(choice_ptr + h * items + n, mask=inside, other=-1).to(tl.int32)
        owner = tl.load(owner_ptr + n, mask=inside, other=0)
        grad = tl.load(grad_ptr + h * groups + owner)
        if UNIT:
            grad /= tl.load(unit_ptr)
        # Items that chose nothing may hold anything, and 0 * NaN would reach every row.
        mask = (place >= 0)[:, None]
        if not EVEN_D:
            mask = mask & (d < depth)[None, :]
        values = tl.load(items_ptr + n[:, None] * depth + d[None, :], mask=mask, other=0.0)
        weight = tl.where(place[None, :] == m[:, None], grad[None, :], 0.0).to(values.dtype)
        total = tl.dot(weight, values, total, input_precision=PRECISION)
    if UNIT:
        total *= tl.load(unit_ptr)
    row = start + m
    inside = row < end
    if MASK:
        live = tl.load(found_mask_ptr + row, mask=inside, other=0).to(tl.int1)
        total = tl.where(live[:, None], total, 0.0)
    tl.store(out_ptr + row[:, None] * depth + d[None, :], total, mask=inside[:, None] & (d < depth)[None, :])
