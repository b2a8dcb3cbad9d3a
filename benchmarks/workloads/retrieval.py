"""Ranks and nearest neighbours without the matrix of scores, and the same from the matrix."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import agreement_topk, retrieval_ranks, similarity_topk
from jrl_kernels.ops.similarity import cases

from ..measure import Step
from .workload import Workload

BLOCK = 4096


def _scores(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1) @ F.normalize(y.float(), dim=1).T


def _ranks(x: Tensor, y: Tensor, positives: Tensor) -> Tensor:
    scores = _scores(x, y)
    return (scores >= scores.gather(1, positives[:, None])).sum(1) - 1


def _topk(x: Tensor, y: Tensor, k: int) -> Tensor:
    return torch.topk(_scores(x, y), k).values


def _agreement(a: Tensor, b: Tensor, k: int) -> Tensor:
    scores = torch.minimum(a.float() @ a.float().T, b.float() @ b.float().T)
    return torch.topk(scores.fill_diagonal_(-torch.inf), k).values


def _rank_inputs(shape: cases.Shape, **options: Any) -> dict[str, Any]:
    """Every row has a column of its own until they run out: five captions to a picture."""
    found = cases.make_inputs(shape, **options)
    owner = torch.arange(shape.rows, device=found["x"].device) * shape.columns // shape.rows
    return {"x": found["x"], "y": found["y"], "positives": owner}


def _topk_inputs(shape: cases.Shape, **options: Any) -> dict[str, Any]:
    found = cases.make_inputs(shape, **options)
    return {"x": found["x"], "y": found["y"], "k": 10}


class _AgreementCases:
    """AVID-CMA's banks, 128 wide, each with itself."""

    BENCHMARK_SHAPES: ClassVar = {
        "cpu": [cases.Shape(5000, 5000, 128)],
        "cuda": [cases.Shape(100000, 100000, 128)],
    }

    @staticmethod
    def flops(shape: cases.Shape, backward: bool) -> int:
        return 2 * cases.flops(shape, backward)

    @staticmethod
    def bytes_moved(shape: cases.Shape, dtype: torch.dtype, backward: bool) -> int:
        return 2 * cases.bytes_moved(shape, dtype, backward)


def _agreement_inputs(shape: cases.Shape, **options: Any) -> dict[str, Any]:
    """Two banks of which each row is compared with all; 32 positives."""
    sides = [cases.make_inputs(shape, seed=seed, **options)["x"] for seed in (0, 1)]
    return {"a": sides[0], "b": sides[1], "k": min(32, shape.rows - 1)}


def _products(arguments: dict[str, Any], backward: bool) -> Step:
    """One pass over the product, a block at a time into memory that stays."""
    sides = [t for t in arguments.values() if isinstance(t, Tensor) and t.is_floating_point()]
    pairs = [(a, a) for a in sides] if "a" in arguments else [(sides[0], sides[1])]
    buffer = torch.empty(
        min(BLOCK, sides[0].shape[0]) * min(BLOCK, pairs[0][1].shape[0]), dtype=sides[0].dtype
    )
    buffer = buffer.to(sides[0].device)

    def step() -> None:
        for x, y in pairs:
            for rows in x.split(BLOCK):
                for columns in y.split(BLOCK):
                    out = buffer[: rows.shape[0] * columns.shape[0]].view(rows.shape[0], columns.shape[0])
                    torch.mm(rows, columns.T, out=out)

    return step


def _values(function: Any) -> Any:
    """The values alone: among equal ones, torch.topk's choice of index is any."""
    return lambda **given: function(**given)[0]


def _search(ours: Any, inputs: Any, eager: Any, of: Any = cases) -> Workload:
    return Workload(
        cases=of,
        make_inputs=inputs,
        ours=ours,
        peers={"eager": eager},
        backends=("cpu", "cuda", "triton"),
        parity=cases.Shape(300, 60, 64),
        products=_products,
        backward=False,
    )


WORKLOADS = {
    "retrieval_ranks": _search(retrieval_ranks, _rank_inputs, _ranks),
    "similarity_topk": _search(_values(similarity_topk), _topk_inputs, _topk),
    "agreement_topk": _search(_values(agreement_topk), _agreement_inputs, _agreement, _AgreementCases),
}
