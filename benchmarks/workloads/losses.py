"""The sisters of InfoNCE, and the same in PyTorch."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import mutual_information, partition_nce, ranking_loss
from jrl_kernels.ops.mutual_information import cases as bound_cases
from jrl_kernels.ops.partition_nce import cases as partition_cases
from jrl_kernels.ops.ranking_loss import cases as ranking_cases

from .workload import Workload


def _hinges(x: Tensor, y: Tensor, metric: str, negatives: Tensor | None = None) -> Tensor:
    """The sum of violations in both directions, as VSE and SCAN have it."""
    x, y = F.normalize(x.float(), dim=1), F.normalize(y.float(), dim=1)
    scores = x @ y.T
    own = scores.diagonal()
    other = ~torch.eye(scores.shape[0], dtype=torch.bool, device=x.device)
    total = ((0.2 - own[:, None] + scores).clamp(min=0) * other).sum()
    total = total + ((0.2 - own[None] + scores).clamp(min=0) * other).sum()
    if negatives is not None:
        queue = x @ F.normalize(negatives.float(), dim=1).T
        total = total + (0.2 - own[:, None] + queue).clamp(min=0).sum()
    return total


def _partition(
    query: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    scale: Tensor,
    log_partition: float,
) -> Tensor:
    """AVID's criterion on gathered rows [B, K + Q, D]."""
    constant = log_partition + torch.tensor(float(negative_index.shape[1])).log()

    def scores(index: Tensor) -> Tensor:
        return scale * torch.einsum("bd,bkd->bk", query, bank[index]).float()

    positive = F.softplus(constant - scores(positive_index)).mean(1)
    return (positive + F.softplus(scores(negative_index) - constant).sum(1)).mean()


WORKLOADS = {
    "ranking_loss": Workload(
        cases=ranking_cases,
        make_inputs=ranking_cases.make_inputs,
        ours=ranking_loss,
        peers={"eager": _hinges},
        backends=("cpu", "triton"),
        parity=ranking_cases.Shape(384, 384, 64),
    ),
    "mutual_information": Workload(
        cases=bound_cases,
        make_inputs=bound_cases.make_inputs,
        ours=mutual_information,
        peers={"eager": partial(mutual_information, backend="reference")},
        backends=("cpu", "triton"),
        parity=bound_cases.SHAPES["local"],
    ),
    "partition_nce": Workload(
        cases=partition_cases,
        make_inputs=partition_cases.make_inputs,
        ours=partition_nce,
        peers={"eager": _partition},
        backends=("cpu", "triton"),
        parity=partition_cases.SHAPES["ragged"],
    ),
}
