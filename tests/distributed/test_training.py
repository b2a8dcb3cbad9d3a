"""Systems trained on two ranks end with the weights of one process that has the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from . import training

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def test_equals_one_process(tmp_path: Path) -> None:
    mp.spawn(training.main, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == "", f"rank {rank}"
