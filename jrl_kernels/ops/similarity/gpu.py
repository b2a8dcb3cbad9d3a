"""What the GPU backends share: cuBLAS fills a tile of scores; the largest k of a row are int64 keys that sort by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .search import Pairs

BLOCK = (4096, 2048)
MAXIMUM_K = 2048
# In the upper half of a key, the score of a place that is not taken; every number's lies above.
NOTHING = torch.iinfo(torch.int32).min


def prepare(tensor: Tensor) -> Tensor:
    """Embeddings in their own dtype, rows contiguous."""
    return tensor.contiguous()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products whose rounding the bounds of search.rounding hold for: no TF32, no sums in float16."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision, matmul.allow_fp16_accumulation
    try:
        matmul.fp32_precision, matmul.allow_fp16_accumulation = "ieee", False
        yield
    finally:
        matmul.fp32_precision, matmul.allow_fp16_accumulation = before


def product(x: Tensor, y: Tensor, tile: Tensor) -> None:
    """tile = x @ y.T, in float32."""
    if not x.is_cuda:
        torch.mm(x.float(), y.float().T, out=tile)
        return
    with _full_precision():
        if x.dtype == tile.dtype:
            torch.mm(x, y.T, out=tile)
        else:
            torch.mm(x, y.T, out_dtype=tile.dtype, out=tile)


def nothing(pairs: Pairs, k: int) -> Tensor:
    """Keys [M, k], largest first and no two alike, without a candidate."""
    rows, columns = pairs.shape
    if k > MAXIMUM_K:
        raise NotImplementedError(
            f"similarity: on a GPU k is at most {MAXIMUM_K}, got {k}; use backend='reference'"
        )
    if columns >= 1 << 32:
        raise NotImplementedError(f"similarity: on a GPU y has less than 2^32 rows, got {columns}")
    least = torch.arange(k - 1, -1, -1, device=pairs.x.device) + torch.iinfo(torch.int64).min
    return least.expand(rows, k).contiguous()


def decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and columns of keys; -inf and -1 of places that are not taken."""
    ordered = (keys >> 32).to(torch.int32)
    taken = ordered != NOTHING
    scores = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).view(torch.float32)
    columns = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    return torch.where(taken, scores, -torch.inf), torch.where(taken, columns, -1)
