"""The Triton kernels of the bounds compile for every architecture without spills, as users launch them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from jrl_kernels._sweep import Source
from jrl_kernels.ops.mutual_information.sweep import Images, Upstream
from tests.triton_aot import CAPABILITIES, Compiler, assert_sound

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]

KERNELS = {"mutual_information_sums_kernel", "mutual_information_gradient_kernel"}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def sweep(
    dtype: torch.dtype,
    bounds: tuple[str, ...],
    rows: int = 4096,
    columns: int = 4096,
    depth: int = 512,
    tf32: bool = False,
    each_direction: bool = False,
) -> None:
    """One forward sweep of each bound and one tile of its backward; nce in both directions at once, or in each as well."""
    from jrl_kernels.ops.mutual_information import triton_kernel

    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    source = Source(meta(rows, depth, dtype=dtype), meta(columns, depth, dtype=dtype), None, meta())
    images = Images(meta(rows, dtype=torch.int32), meta(columns, dtype=torch.int32))
    x, y = (meta(rows), meta(rows)), (meta(columns), meta(columns))
    for bound in bounds:
        if bound == "jsd":
            triton_kernel.softplus_sums(source, images)
            sides: list[tuple[Tensor | None, ...]] = [(None, None, None, None)]
        elif bound == "dv":
            sides = [(*x, None, None)]
        else:
            sides = [(*x, *y)]
            if each_direction:
                sides += [(*x, None, None), (None, None, *y)]
            for side in sides:
                triton_kernel.log_sum_exp(source, images, side[0] is not None, side[2] is not None)
        for side in sides:
            tile, block = triton_kernel.gradient(source, images, Upstream(bound, meta(), meta(), *side))
            tile(0, min(block[0], rows), 0, min(block[1], columns))


RAGGED = {"rows": 1000, "columns": 999, "depth": 771}
CASES: dict[str, Callable[[], None]] = {
    "bfloat16": partial(sweep, torch.bfloat16, ("nce", "jsd", "dv"), each_direction=True),
    "float16, ragged": partial(sweep, torch.float16, ("nce", "jsd"), **RAGGED),
    "tf32": partial(sweep, torch.float32, ("nce",), tf32=True),
    "float32, ragged": partial(sweep, torch.float32, ("nce",), **RAGGED),
}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(compile_case: Compiler, case: str, capability: tuple[int, int]) -> None:
    found = compile_case(case, capability)
    assert {compiled.kernel for compiled in found} == KERNELS
    # Without TF32 the matrix units are not to be used.
    assert_sound(found, capability, lambda compiled: not case.startswith("float32"))
