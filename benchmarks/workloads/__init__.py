"""What is compared on each op: ours by backend, and the same as people write it in PyTorch."""

from __future__ import annotations

import os
from importlib import import_module

from .workload import Workload as Workload

WORKLOADS: dict[str, Workload] = {}
LACKING: dict[str, str] = {}
"""The modules below that a jrl_kernels older than this folder cannot serve, and why: see `benchmarks.compare`."""

for _name in ("contrastive", "losses", "retrieval", "word_region", "gumbel"):
    try:
        WORKLOADS.update(import_module(f".{_name}", __name__).WORKLOADS)
    except ImportError as _error:
        if "JRL_BENCHMARKS_OF_OLDER" not in os.environ:
            raise
        LACKING[_name] = str(_error)
