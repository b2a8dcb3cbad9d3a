"""The Triton backend of the contrastive losses where there is no GPU: in Triton's interpreter, and what needs no kernel."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from jrl_kernels import _triton
from jrl_kernels import _triton_launch as triton_launch
from jrl_kernels._positives import Positives
from jrl_kernels._sweep import Source
from jrl_kernels.ops.info_nce import triton_kernel
from jrl_kernels.ops.info_nce.sweep import Options, Upstream
from tests.interpreter import groups, run
from tests.serving import Server


@pytest.mark.slow
@pytest.mark.parametrize("group", groups("info_nce", "operators"))
def test_in_the_interpreter(group: str, interpreter: Server) -> None:
    run(group, interpreter)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def big(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, width: int = 768) -> Source:
    x, y = (torch.empty(count, width, dtype=dtype, device="meta") for count in (rows, columns))
    return Source(x, y, None, torch.empty((), device="meta"))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("planes", [1, 2, 6])
@pytest.mark.parametrize(
    ("rows", "columns"), [(65536, 65536), (1 << 20, 1 << 20), (100, 1 << 24), (1 << 22, 1)]
)
def test_partials_stay_within_their_budget(rows: int, columns: int, planes: int) -> None:
    problem = triton_launch.Problem(big(rows, columns), detailed=planes > 1)
    chunk = problem.column_chunk(planes)
    tile = problem.tile
    assert 0 < chunk <= columns
    assert chunk == columns or chunk % tile.columns == 0
    partials = 4 * planes * (-(-chunk // tile.columns) * rows + -(-rows // tile.rows) * chunk)
    assert partials <= triton_launch.PARTIALS_BYTES
    assert 2 * partials > triton_launch.PARTIALS_BYTES or chunk == columns or chunk == tile.columns


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4096, 4096), (65536, 65536), (1 << 20, 1 << 20), (64, 1 << 24), (1 << 24, 1), (40000, 50001), (1, 1)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradient_buffer_stays_within_its_budget(rows: int, columns: int, dtype: torch.dtype) -> None:
    source = big(rows, columns, dtype)
    grad, other = (torch.empty(count, device="meta") for count in (rows, columns))
    options = Options(Positives(), None, None, True, True, "mean", False)
    tile, block = triton_kernel.softmax_gradient(
        source, options, Upstream(grad, grad, None, other, other, None, None)
    )
    assert isinstance(tile, triton_kernel._Gradient)
    assert tile.buffer.numel() * dtype.itemsize <= triton_kernel.GRADIENT_BYTES
    assert block[0] > 0
    assert block[1] > 0
    if rows * max(columns, 16) * dtype.itemsize <= triton_kernel.GRADIENT_BYTES:
        assert block[0] >= rows
        assert block[1] >= columns
    tiles = -(-rows // block[0]) * -(-columns // block[1])
    assert tiles <= 2 * rows * max(columns, 16) * dtype.itemsize / triton_kernel.GRADIENT_BYTES + 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), 8), ((8, 9), 8), ((9, 0), 9), ((10, 0), 10), ((10, 3), 10), ((11, 0), 10), ((12, 0), 8)],
)
def test_architecture(capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert _triton.architecture(torch.device("cuda")) == expected


def test_precision_follows_pytorch() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            matmul.fp32_precision = setting
            assert _triton.precision(torch.float32) == expected
            assert _triton.precision(torch.bfloat16) == "half"
    finally:
        matmul.fp32_precision = before
