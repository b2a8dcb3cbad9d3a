"""The Triton backend of noise-contrastive estimation where there is no GPU: in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from jrl_kernels.ops.partition_nce import triton_kernel
from tests.interpreter import groups, run
from tests.serving import Server


@pytest.mark.slow
@pytest.mark.parametrize("group", groups("partition_nce"))
def test_in_the_interpreter(group: str, interpreter: Server) -> None:
    run(group, interpreter)


@pytest.mark.parametrize("queries", [0, 1, 7, 256, 100_000])
@pytest.mark.parametrize("terms", [2, 96, 1025, 65_536])
@pytest.mark.parametrize("depth", [1, 128, 768, 8192])
def test_parts_cover_every_term(queries: int, terms: int, depth: int) -> None:
    block, wide, span = triton_kernel._cut(queries, terms, depth)
    parts = -(-terms // span)
    assert wide >= depth and span % block == 0 and (parts - 1) * span < terms <= parts * span
    assert block * wide <= max(triton_kernel.BLOCK_ELEMENTS, triton_kernel.WIDEST)
    assert parts * max(queries, 1) <= triton_kernel.PROGRAMS + max(queries, 1)
