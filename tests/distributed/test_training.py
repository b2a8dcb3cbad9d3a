"""Systems trained on two ranks end with the weights of one process that has the whole batch."""

from __future__ import annotations

import subprocess
import sys
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


def test_the_example_checks_itself() -> None:
    example = Path(__file__).parents[2] / "examples" / "distributed_info_nce.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(example)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["gather", "ring"]
