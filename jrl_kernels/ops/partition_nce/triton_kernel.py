"""The Triton backend: launches the kernel of triton_tiles on NVIDIA GPUs. No launch reads the GPU's memory."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ... import _triton  # noqa: F401  (mends Triton's interpreter)
from ..._dispatch import interpreting
from .triton_tiles import partition_nce_kernel

WARPS = 4
# Elements of a block of gathered rows, 32 a thread: their addresses take twice as many registers.
BLOCK_ELEMENTS = WARPS * 32 * 32
WIDEST = 2 * BLOCK_ELEMENTS
# Few queries are cut into parts so that about this many programs share the chip.
PROGRAMS = 1024


def _cut(queries: int, terms: int, depth: int) -> tuple[int, int, int]:
    """Rows of the bank a block, width of a row in a block, and terms a program."""
    wide = triton.next_power_of_2(max(depth, 16))
    block = 4 if interpreting() else max(1, min(64, BLOCK_ELEMENTS // wide, triton.next_power_of_2(terms)))
    parts = min(triton.cdiv(PROGRAMS, max(queries, 1)), triton.cdiv(terms, 4 * block))
    return block, wide, triton.cdiv(triton.cdiv(terms, parts), block) * block


def forward(
    query: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    positive_mask: Tensor | None,
    scale: Tensor,
    log_constant: Tensor,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Row losses [B] and, with `gradient`, each row's sum of d loss / d s times its row of the bank, [B, D]."""
    queries, depth = query.shape
    if depth > WIDEST:
        raise NotImplementedError(
            f"partition_nce: backend 'triton' takes D up to {WIDEST}, got {depth}; use backend='reference'"
        )
    positives, negatives = positive_index.shape[1], negative_index.shape[1]
    block, wide, span = _cut(queries, positives + negatives, depth)
    parts = triton.cdiv(positives + negatives, span)
    losses = torch.empty(queries, parts, dtype=torch.float32, device=query.device)
    shape = (queries, parts, depth)
    direction = torch.empty(shape, dtype=torch.float32, device=query.device) if gradient else None
    if positive_mask is None:
        weight = torch.full((queries,), 1 / positives, device=query.device)
    else:
        count = positive_mask.sum(1)
        weight = torch.where(count > 0, 1 / count.clamp(min=1), 0.0)
    if queries > 0:
        with torch.cuda.device_of(query):
            partition_nce_kernel[(queries, parts)](
                query_ptr=query,
                bank_ptr=bank,
                positive_index_ptr=positive_index,
                positive_mask_ptr=positive_mask,
                negative_index_ptr=negative_index,
                positive_weight_ptr=weight,
                scale_ptr=scale,
                constant_ptr=log_constant,
                losses_ptr=losses,
                direction_ptr=direction,
                depth=depth,
                bank_stride=bank.stride(0),
                positives=positives,
                negatives=negatives,
                span=span,
                MASKED=positive_mask is not None,
                GRADIENT=gradient,
                BLOCK=block,
                BLOCK_D=wide,
                num_warps=WARPS,
            )
    return losses.sum(1), None if direction is None else direction.sum(1)
