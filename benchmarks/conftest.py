"""Options of `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.case import ALL_DTYPES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("jrl", "cases of the fused ops")
    devices = ("cpu", "cuda")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=devices, default=default, help="where; %(default)s without it")
    group.addoption(
        "--dtype", choices=list(ALL_DTYPES), action="append", help="repeatable; as benchmarks.run without it"
    )
    group.addoption(
        "--all-shapes",
        action="store_true",
        help="every shape of benchmarks.run; without it the first of each op, which takes a CPU about three minutes",
    )
