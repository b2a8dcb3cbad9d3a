"""Arguments that one rank refuses make every rank raise at once, and none is left waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from . import refusals


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_raises(size: int, tmp_path: Path) -> None:
    mp.spawn(refusals.main, (size, str(tmp_path / "store"), str(tmp_path)), nprocs=size)
    for rank in range(size):
        assert (problems := (tmp_path / f"{rank}.txt").read_text()) == "", f"rank {rank}: {problems}"
