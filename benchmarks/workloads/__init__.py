"""What is compared on each op: ours by backend, and the same as people write it in PyTorch."""

from __future__ import annotations

from . import contrastive, gumbel, losses, retrieval, word_region
from .workload import Workload as Workload

WORKLOADS: dict[str, Workload] = {
    **contrastive.WORKLOADS,
    **losses.WORKLOADS,
    **retrieval.WORKLOADS,
    **word_region.WORKLOADS,
    **gumbel.WORKLOADS,
}
