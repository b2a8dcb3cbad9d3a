"""The Triton backend of the bounds where there is no GPU: in Triton's interpreter, and what needs no kernel."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from jrl_kernels._sweep import Source
from jrl_kernels.ops.mutual_information import triton_kernel
from jrl_kernels.ops.mutual_information.sweep import Images, Upstream
from tests.interpreter import groups, run
from tests.serving import Server


@pytest.mark.slow
@pytest.mark.parametrize("group", groups("mutual_information"))
def test_in_the_interpreter(group: str, interpreter: Server) -> None:
    run(group, interpreter)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4096, 4096), (65536, 65536), (1 << 20, 1 << 20), (64, 1 << 24), (1 << 24, 1), (1, 1)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradient_buffer_stays_within_its_budget(
    rows: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def meta(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    source = Source(meta(rows, 768, kind=dtype), meta(columns, 768, kind=dtype), None, meta())
    images = Images(meta(rows, kind=torch.int32), meta(columns, kind=torch.int32))
    upstream = Upstream("nce", meta(), meta(), meta(rows), meta(rows), meta(columns), meta(columns))
    tile, block = triton_kernel.gradient(source, images, upstream)
    assert isinstance(tile, triton_kernel._Gradient)
    assert tile.buffer.numel() * dtype.itemsize <= triton_kernel.GRADIENT_BYTES
    assert block[0] > 0 and block[1] > 0
    if rows * max(columns, 16) * dtype.itemsize <= triton_kernel.GRADIENT_BYTES:
        assert block[0] >= rows and block[1] >= columns
