"""How the Triton kernels of word-region attention are launched: which of them, tile sizes by what multiplies, and operands."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ... import _dispatch, _triton
from .sweep import Problem

# Up to this many keys, padded to a power of two, all of an image's fit one tile of scores, and its Gram matrix beside them.
FUSED_KEYS = 64
INTERPRETER_FUSED_KEYS = 32
# Queries normalised together, times keys: the backward holds several such tiles at once, and larger ones do not stay in the
# registers under Triton 3.7.
FUSED_SCORES = 1 << 11
# Captions that are normalised together may not be longer.
MOST_WORDS = 4096
FEWEST, MOST_QUERIES = 16, 128
# Of all matrices of a tile of the backward. Smaller ones would stay in the L2 cache, but not be worth their launches.
TILE_BYTES = 128 << 20


class Block(NamedTuple):
    """How a program cuts the problem."""

    scores: int  # queries times keys, both padded
    keys: int  # of a tile where not all of them fit
    depth: int  # of a step of the products
    warps: int
    stages: int


# By what multiplies (_triton.precision) and the kernel's work on each score, since what it keeps in registers must not spill.
BLOCKS = {
    ("half", "fused forward"): Block(8192, 0, 64, 8, 3),
    ("half", "fused gradient"): Block(4096, 0, 64, 8, 3),
    ("half", "statistics"): Block(8192, 64, 64, 8, 3),
    ("half", "attention"): Block(16384, 128, 64, 8, 3),
    ("half", "gradient"): Block(4096, 32, 64, 8, 3),
    ("tf32", "fused forward"): Block(8192, 0, 32, 8, 3),
    ("tf32", "fused gradient"): Block(4096, 0, 32, 8, 3),
    ("tf32", "statistics"): Block(16384, 128, 32, 8, 3),
    ("tf32", "attention"): Block(16384, 128, 32, 8, 3),
    ("tf32", "gradient"): Block(8192, 64, 32, 8, 3),
    ("ieee", "fused forward"): Block(2048, 0, 16, 8, 2),
    ("ieee", "fused gradient"): Block(2048, 0, 16, 8, 2),
    ("ieee", "statistics"): Block(4096, 64, 16, 8, 2),
    ("ieee", "attention"): Block(2048, 32, 16, 8, 2),
    ("ieee", "gradient"): Block(4096, 64, 16, 8, 2),
}
INTERPRETER_BLOCK = Block(256, 16, 16, 1, 1)


def padded(length: int) -> int:
    return max(FEWEST, int(triton.next_power_of_2(length)))


def normalization(prenormalize: str) -> tuple[bool, str]:
    """Whether `prenormalize` begins with a leaky ReLU, and what it divides by."""
    leaky, _, norm = prenormalize.rpartition("+")
    return (True, "none") if norm == "leakyrelu" else (leaky == "leakyrelu", norm)


def words_together(problem: Problem) -> int:
    """Rows of a caption whose queries are normalised together, 1 where each stands alone."""
    if normalization(problem.prenormalize)[1] == "none":
        return 1
    words = problem.queries.shape[1]
    if words > MOST_WORDS:
        raise NotImplementedError(
            f"word_region: backend 'triton' normalises at most {MOST_WORDS} queries together, got {words}; "
            "use backend='reference'"
        )
    return int(triton.next_power_of_2(words))


def fused(problem: Problem) -> bool:
    """Whether one tile holds the scores of all of an image's keys."""
    keys = padded(problem.keys.shape[1])
    most = INTERPRETER_FUSED_KEYS if _dispatch.interpreting() else FUSED_KEYS
    return keys <= most and words_together(problem) * keys <= FUSED_SCORES


def block(problem: Problem) -> tuple[int, int]:
    """Images and captions of a tile: about as many queries as keys, since a tile's products read and write both gradients."""
    images, regions, _ = problem.keys.shape
    captions, words, _ = problem.queries.shape
    matrices = 1.0 + (problem.key_values is not None) + 2 * problem.cosine
    if problem.cosine and not fused(problem):
        matrices += 2 + problem.values.shape[2] / regions
    elements = int(TILE_BYTES / (matrices * problem.keys.element_size()))
    if images * regions * captions * words <= elements:
        return images, captions
    most_images = max(math.isqrt(elements), elements // (captions * words)) // regions
    some_images = min(max(most_images, 1), images)
    most_captions = elements // (some_images * regions * words)
    return some_images, min(max(most_captions, 1), captions)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


class Launch:
    """What a kernel that does `work` is launched with for one problem."""

    def __init__(self, problem: Problem, work: str) -> None:
        _, self.regions, depth = problem.keys.shape
        captions, self.words, _ = problem.queries.shape
        self.values = problem.values
        kind = _triton.precision(problem.keys.dtype)
        tile = INTERPRETER_BLOCK if _dispatch.interpreting() else BLOCKS[kind, work]
        leaky, norm = normalization(problem.prenormalize)
        self.together = words_together(problem)
        whole = work.startswith("fused")
        # Normalisation over words and products of values keep another tile of scores in registers.
        more = not whole and (self.together > 1 or problem.key_values is not None)
        scores = tile.scores // 2 if more else tile.scores
        self.keys = padded(self.regions) if whole else tile.keys
        self.queries = max(min(scores // self.keys, MOST_QUERIES), FEWEST, self.together)
        if not whole:
            self.keys = min(self.keys, max(scores // self.queries, FEWEST))
        self.steps = {"BLOCK_D": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages}
        self.operands: dict[str, Any] = {
            "query_ptr": problem.queries,
            "key_ptr": problem.keys,
            "query_value_ptr": problem.query_values,
            "key_value_ptr": problem.key_values,
            "query_mask_ptr": _bytes(problem.query_mask),
            "key_mask_ptr": _bytes(problem.key_mask),
            "scale_ptr": problem.attention_scale,
            "captions": captions,
            "words": self.words,
            "regions": self.regions,
            "depth": depth,
            "value_depth": self.values.shape[2],
            "SHARED": problem.key_values is None,
            "HARD": problem.hard,
            "LEAKY": leaky,
            "NORM": norm,
            "QUERY_MASK": problem.query_mask is not None,
            "KEY_MASK": problem.key_mask is not None,
            "EVEN_D": depth % tile.depth == 0,
            "EVEN_E": self.values.shape[2] % tile.depth == 0,
            "PRECISION": "tf32" if kind == "tf32" else "ieee",
            "BLOCK_M": self.queries,
            "BLOCK_R": self.keys,
            "BLOCK_T": self.together,
            **self.steps,
        }

    def row_tiles(self, captions: int) -> int:
        if self.together > 1:
            return -(-captions // (self.queries // self.together))
        return -(-captions * self.words // self.queries)

    @property
    def key_tiles(self) -> int:
        return -(-self.regions // self.keys)
