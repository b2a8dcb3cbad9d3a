"""The CPU backend: a BLAS fills a tile of dots of valid queries with some images, C++ loops of the extension do the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ... import _extension
from ..._checks import accumulation
from ..._extension import pointer
from .packing import packed as pack
from .sweep import Problem, Tile

__all__ = ["block", "forward", "gradient_tile", "pack", "prepare", "through_matrices"]

TILE_BYTES = 1 << 20  # of one buffer; a tile has up to four

# As csrc/cpu/word_region.cpp has them: a way to normalise, plus 4 where a leaky ReLU comes first.
PRENORMALIZE = {
    "none": 0,
    "softmax": 1,
    "l2norm": 2,
    "l1norm": 3,
    "leakyrelu": 4,
    "leakyrelu+l2norm": 6,
    "leakyrelu+l1norm": 7,
}


def prepare(tensor: Tensor) -> Tensor:
    """In the dtype that the tiles are computed in, rows contiguous."""
    return tensor.to(accumulation(tensor.dtype)).contiguous()


def _offsets(problem: Problem) -> tuple[int, ...]:
    assert problem.offsets is not None  # the glue has packed it
    return problem.offsets


def block(problem: Problem) -> tuple[int, int]:
    """All captions and as many images as a tile holds, or of one image as many captions."""
    offsets = _offsets(problem)
    rows = max(1, TILE_BYTES // (problem.keys.shape[1] * problem.keys.element_size()))
    total = max(1, offsets[-1])
    if total <= rows:
        return rows // total, max(1, problem.captions)
    longest = max(end - start for start, end in itertools.pairwise(offsets))
    return 1, max(1, rows // longest)


def _tiles(problem: Problem) -> Iterator[tuple[int, int, int, int]]:
    images, captions = block(problem)
    for b0 in range(0, problem.keys.shape[0], images):
        for c0 in range(0, problem.captions, captions):
            c1 = min(c0 + captions, problem.captions)
            start, end = problem.rows(c0, c1)
            if start < end:
                yield b0, min(b0 + images, problem.keys.shape[0]), c0, c1


def _launch(name: str, like: Tensor, *arguments: int | float | bool) -> None:
    suffix = "f64_cpu" if like.dtype == torch.float64 else "f32_cpu"
    _extension.launch(f"word_region_{name}_{suffix}", *arguments)


def _dots(queries: Tensor, keys: Tensor) -> Tensor:
    """[rows, images, R] of queries [rows, D] and keys [images, R, D]."""
    return torch.mm(queries, keys.flatten(0, 1).T).view(queries.shape[0], *keys.shape[:2])


def _of_each_image(tile: Tensor, matrices: Tensor) -> Tensor:
    """tile[:, i] @ matrices[i]: [rows, images, P], [images, P, Q] -> [rows, images, Q]."""
    result = tile.new_empty(*tile.shape[:2], matrices.shape[2])
    for image, matrix in enumerate(matrices):
        torch.mm(tile[:, image], matrix, out=result[:, image])
    return result


def through_matrices(queries: int, regions: int, width: int) -> bool:
    """Whether the norms of an image's contexts cost less through the R x R products of its values than through contexts."""
    return regions * (queries + width) <= queries * width


class _Tile:
    """What forward and backward compute alike of images b0:b1 and captions c0:c1: dots, then the attention over them."""

    def __init__(self, problem: Problem, b0: int, b1: int, c0: int, c1: int) -> None:
        offsets = _offsets(problem)
        self.problem = problem
        self.rows = slice(*problem.rows(c0, c1))
        self.images = slice(b0, b1)
        self.offsets = torch.tensor(offsets[c0 : c1 + 1])
        self.a = _dots(problem.queries[self.rows], problem.keys[self.images])
        self.u = None
        if problem.key_values is not None and problem.query_values is not None:
            self.u = _dots(problem.query_values[self.rows], problem.key_values[self.images])
        self.sizes = c1 - c0, pointer(self.offsets), b1 - b0, problem.keys.shape[1]
        mask = problem.key_mask
        self.key_mask = pointer(mask, 0 if mask is None else b0 * mask.shape[1])
        self.options = float(problem.attention_scale), PRENORMALIZE[problem.prenormalize], problem.hard

    def at(self, numbers: Tensor | None) -> int:
        """Where this tile's part of numbers [B, N] starts; 0 for None."""
        start = 0 if numbers is None else self.images.start * numbers.shape[1] + self.rows.start
        return pointer(numbers, start)

    def attend(
        self, alpha: Tensor, agreement: Tensor | None = None, log_sum_exp: Tensor | None = None
    ) -> None:
        """The attention into `alpha`, which may be `a`, and its numbers into the tile's part of the others, [B, N]."""
        stride = 0 if agreement is None else agreement.shape[1]
        results = pointer(alpha), self.at(agreement), self.at(log_sum_exp), stride
        tile = pointer(self.a), *self.sizes, self.key_mask, pointer(self.u)
        _launch("attend", self.a, *tile, *self.options, *results)


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    offsets = _offsets(problem)
    shape = problem.keys.shape[0], offsets[-1]
    match, log_sum_exp, norm = (problem.keys.new_ones(shape) for _ in range(3))
    for b0, b1, c0, c1 in _tiles(problem):
        tile = _Tile(problem, b0, b1, c0, c1)
        tile.attend(tile.a, match, log_sum_exp)
        if problem.cosine:
            alpha, values = tile.a, problem.values[b0:b1]
            if through_matrices(offsets[-1], *values.shape[1:]):
                pair = alpha, _of_each_image(alpha, torch.bmm(values, values.mT))
            else:
                contexts = _of_each_image(alpha, values)
                pair = contexts, contexts
            places = tile.at(match), tile.at(norm), match.shape[1]
            _launch("norms", alpha, pointer(pair[0]), pointer(pair[1]), *pair[0].shape, *places)
    return match, log_sum_exp, norm


def gradient_tile(
    problem: Problem,
    grad: Tensor,
    match: Tensor,
    log_sum_exp: Tensor,
    norm: Tensor,
    b0: int,
    b1: int,
    c0: int,
    c1: int,
) -> Tile:
    tile = _Tile(problem, b0, b1, c0, c1)
    alpha, weighted = torch.empty_like(tile.a), None
    tile.attend(alpha)
    if problem.cosine:
        values = problem.values[b0:b1]
        if through_matrices(_offsets(problem)[-1], *values.shape[1:]):
            weighted = _of_each_image(alpha, torch.bmm(values, values.mT))
        else:
            weighted = _of_each_image(_of_each_image(alpha, values), values.mT)
    dscale = tile.a.new_empty(c1 - c0, b1 - b0)
    buffers = pointer(tile.u), pointer(alpha), pointer(weighted)
    numbers = tile.at(grad), tile.at(match), tile.at(norm), match.shape[1]
    _launch(
        "gradient", tile.a, pointer(tile.a), *tile.sizes, tile.key_mask, *buffers, *numbers, *tile.options,
        pointer(dscale),
    )  # fmt: skip
    return Tile(tile.a, tile.u, alpha if problem.cosine else None, weighted, dscale)
