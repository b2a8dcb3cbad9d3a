"""Gumbel noise of a tile: Philox4x32-10 keyed by the seed at each element's index, the same numbers on every backend."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_words(seed, block, STREAM: tl.constexpr):
    """Four random words for each block of four elements; `block` is an int64 tensor."""
    stream = tl.full(block.shape, STREAM, tl.uint32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, stream, tl.zeros_like(stream))


@triton.jit
def gumbel_of(word):
    """-log(-log U), U the upper 23 bits and a half. tl.log is accurate near 1; log2.approx would return -0 there, or less."""
    uniform = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def gumbel_tile(
    seed, row, first_column, columns, STREAM: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Noise [rows, BLOCK] of elements [row, first_column + ...] of a tensor with `columns` columns; `row` is int64.

    With QUADS, where `columns` is a multiple of 4, all four words of a block are used: a quarter of the work.
    """
    if QUADS:
        quad = tl.arange(0, BLOCK // 4)
        block = row[:, None] * (columns // 4) + (first_column // 4 + quad)[None, :]
        a, b, c, d = random_words(seed, block, STREAM)
        word = tl.join(tl.join(a, c), tl.join(b, d)).reshape(row.shape[0], BLOCK)
    else:
        column = first_column + tl.arange(0, BLOCK)
        element = row[:, None] * columns + column[None, :]
        a, b, c, d = random_words(seed, element >> 2, STREAM)
        place = (element & 3).to(tl.int32)
        word = tl.where(place == 0, a, tl.where(place == 1, b, tl.where(place == 2, c, d)))
    return gumbel_of(word)
