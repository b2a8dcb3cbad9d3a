"""The Triton backend of the ranking loss where there is no GPU: in Triton's interpreter, and what needs no kernel."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from jrl_kernels._sweep import Source
from jrl_kernels.ops.ranking_loss import triton_kernel
from jrl_kernels.ops.ranking_loss.sweep import Options
from tests.interpreter import groups, run
from tests.serving import Server


@pytest.mark.slow
@pytest.mark.parametrize("group", groups("ranking_loss"))
def test_in_the_interpreter(group: str, interpreter: Server) -> None:
    run(group, interpreter)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4096, 4096), (65536, 65536), (1 << 20, 1 << 20), (64, 1 << 24), (1 << 24, 1), (40000, 50001), (1, 1)],
)
@pytest.mark.parametrize("metric", ["dot", "order"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_buffers_stay_within_their_budget(
    rows: int, columns: int, metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    x, y = (torch.empty(count, 768, dtype=dtype, device="meta") for count in (rows, columns))
    source = Source(x, y, None, torch.empty((), device="meta"))
    pairs = min(rows, columns)
    options = Options(metric, False, None, None, True, True, pairs, 0)
    grad = torch.empty(pairs, device="meta")
    tile, block = triton_kernel.gradient(source, options, grad, grad, grad)
    assert isinstance(tile, triton_kernel._Gradient)
    budget = triton_kernel.BUFFER_BYTES
    size = tile.buffer.element_size()
    assert tile.buffer.numel() * size <= budget
    assert tile.scores.buffer is None or tile.scores.buffer.numel() * 4 <= budget
    assert tile.buffer.numel() >= block[0] * block[1]
    if rows * max(columns, 16) * size <= budget:
        assert block[0] >= rows
        assert block[1] >= columns
    tiles = -(-rows // block[0]) * -(-columns // block[1])
    assert tiles <= 2 * rows * max(columns, 16) * size / budget + 1
