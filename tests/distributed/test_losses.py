"""Losses across ranks equal those of one process with the whole batch, on 1 to 4 ranks in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jrl_kernels import distributed

from . import ranks

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.mark.parametrize("size", sorted(ranks.ROWS))
def test_equals_one_process(size: int, tmp_path: Path) -> None:
    mp.spawn(ranks.main, (size, str(tmp_path / "store"), str(tmp_path), None), nprocs=size)
    for rank in range(size):
        assert (tmp_path / f"{rank}.txt").read_text() == "", f"rank {rank}"


@pytest.mark.parametrize(
    ("end", "what"), [("death", "agreeing on sizes and options"), ("hang", "passing columns round the ranks")]
)
def test_a_rank_that_fails_ends_the_others(end: str, what: str, tmp_path: Path) -> None:
    processes = mp.start_processes(
        ranks.main,
        (3, str(tmp_path / "store"), str(tmp_path), end),
        nprocs=3,
        join=False,
        start_method="spawn",
    )
    for process in processes.processes:
        process.join(60)
    assert [process.exitcode for process in processes.processes] == [0, 0, 9]
    for rank in (0, 1):
        seconds, message = (tmp_path / f"{rank}.txt").read_text().split(" ", 1)
        assert float(seconds) < 20
        assert message.startswith(f"distributed.info_nce: {what} failed on rank {rank} of 3")
        assert "if another rank died, hung or raised, look there" in message


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"distributed.info_nce: torch.distributed is not initialised"):
        distributed.info_nce(torch.randn(2, 3), torch.randn(2, 3))
