"""The drop-ins across ranks, in real processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.hosts import ranks

HOSTS = ("open_clip", "sentence_transformers", "lightly", "torchmultimodal")


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in HOSTS),
    reason=f"needs {', '.join(HOSTS)}; make test installs them",
)
def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    mp.spawn(ranks.main, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == "", f"rank {rank}"
