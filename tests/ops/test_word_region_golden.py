"""Golden values of word-region attention on the backends that need no interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.ops.conformance import BACKENDS
from tests.ops.word_region_golden import CASES, TOLERANCE, Case, check

PRECISE = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}".replace("torch.", ""), marks=case.marks)
    for case in BACKENDS
    for dtype in TOLERANCE
    if not (case.id == "triton" and dtype == torch.float64)
]


@pytest.mark.parametrize(("backend", "device", "dtype"), PRECISE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_golden(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    check(case, backend, device, dtype)
