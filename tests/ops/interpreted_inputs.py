"""Sources, positives and options that the interpreted tests of the contrastive losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from jrl_kernels._positives import Positives
from jrl_kernels._sweep import Source
from jrl_kernels.ops.info_nce.cases import Shape
from jrl_kernels.ops.info_nce.sweep import Options

HALVES_AND_FLOAT = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = Shape(21, 30, 19)


def source_of(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    bias: float | None = None,
    scores: bool = False,
) -> Source:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape.rows, shape.width, generator=generator).to(dtype)
    y = torch.randn(shape.columns, shape.width, generator=generator).to(dtype)
    offset = None if bias is None else torch.tensor(bias)
    if scores:
        return Source(None, None, (x.float() @ y.float().T).to(dtype), torch.tensor(scale), offset)
    return Source(x, y, None, torch.tensor(scale), offset)


def logits_of(source: Source) -> Tensor:
    if source.scores is not None:
        dot = source.scores.double()
    else:
        assert source.x is not None
        assert source.y is not None
        dot = source.x.double() @ source.y.double().T
    s = source.scale.double() * dot
    return s if source.bias is None else s + source.bias.double()


def ids(count: int, kinds: int, seed: int) -> Tensor:
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed)) + (1 << 40)


def pairs_of(kind: str, shape: Shape) -> Positives:
    if kind == "ids":
        return Positives(x_ids=ids(shape.rows, 7, 1), y_ids=ids(shape.columns, 7, 2))
    if kind == "none":
        return Positives()
    dense = torch.rand(shape.rows, shape.columns, generator=torch.Generator().manual_seed(3)) < 0.1
    rows, columns = dense.nonzero(as_tuple=True)
    return Positives(rows=rows, columns=columns)


def options_of(
    kind: str,
    shape: Shape,
    *,
    exclude: bool = False,
    rows: bool = True,
    columns: bool = True,
    multi_positive: str = "mean",
    details: bool = False,
) -> Options:
    return Options(
        pairs_of(kind, shape),
        ids(shape.rows, 3, 4) if exclude else None,
        ids(shape.columns, 3, 5) if exclude else None,
        rows,
        columns,
        multi_positive,
        details,
    )
