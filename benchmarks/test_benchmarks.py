"""`pytest benchmarks --benchmark-only`: the cases of benchmarks.run, ours and eager PyTorch, as pytest-benchmark shows them.

A group is one op, shape, dtype and pass. Parity comes first here too, and a GPU is waited for and its L2 overwritten.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import ALL_DTYPES, PASSES, Variant, check_parity, name_of, step, variants
from benchmarks.measure import CacheFlush, rounds, synchronize, time_once
from benchmarks.run import DTYPES
from benchmarks.table import shape_of
from benchmarks.workloads import WORKLOADS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device = option("--device")
    dtypes = [ALL_DTYPES[name] for name in option("--dtype") or map(name_of, DTYPES[device])]
    cases = []
    for op, workload in WORKLOADS.items():
        shapes = workload.cases.BENCHMARK_SHAPES[device]
        for shape in shapes if option("--all-shapes") else shapes[:1]:
            for dtype in dtypes:
                for which in PASSES if workload.backward else PASSES[:1]:
                    for variant in variants(op, workload, device, dtype, against=("eager",))[0]:
                        names = (op, shape_of(shape), name_of(dtype), which, variant.name.replace(" ", "_"))
                        cases.append(pytest.param(op, shape, dtype, which, variant, id="-".join(names)))
    metafunc.parametrize(("op", "shape", "dtype", "which", "variant"), cases)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--device"))


@cache
def parity(op: str, variant: str, dtype: torch.dtype, device: str) -> float | str:
    (found,) = [v for v in variants(op, WORKLOADS[op], device, dtype, ("eager",))[0] if v.name == variant]
    return check_parity(found, WORKLOADS[op], device, dtype)


def test_op(
    benchmark: BenchmarkFixture,
    op: str,
    shape: Any,
    dtype: torch.dtype,
    which: str,
    variant: Variant,
    device: str,
) -> None:
    error = parity(op, variant.name, dtype, device)
    assert isinstance(error, float), error
    workload = WORKLOADS[op]
    arguments = workload.make_inputs(shape, dtype=dtype, device=device)
    call = step(variant.function, arguments, backward=which == PASSES[1])

    def whole() -> None:
        call()
        synchronize(device)

    whole()
    benchmark.group = f"{op} {shape_of(shape)} {name_of(dtype)} {which}"
    benchmark.extra_info.update(error=error, flops=workload.cases.flops(shape, which == PASSES[1]))
    flush = CacheFlush(device)

    def prepare() -> None:
        flush()
        synchronize(device)

    benchmark.pedantic(whole, setup=prepare, rounds=rounds(time_once(call, device)), iterations=1)
