"""Noise-contrastive estimation on CPU tensors in Triton's interpreter, whose blocks hold 4 rows of the bank.

Run by test_partition_nce_triton.py, in processes that set TRITON_INTERPRET=1 before anything imports triton.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import noise_log_partition, partition_nce
from jrl_kernels.ops.partition_nce import triton_kernel
from jrl_kernels.ops.partition_nce.cases import SHAPES, Shape, make_inputs
from tests.ops.conformance import assert_close_to_truth, cast, det, value_and_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")


def judge(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    found, plain, truth = (
        value_and_gradients(partial(partition_nce, backend=backend), cast(arguments, precision))
        for backend, precision in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
    )
    assert_close_to_truth(found, plain, truth, dtype)


class TestKernel:
    @pytest.mark.parametrize(("positives", "expected"), [(1, 5.6987244320), (2, 3.9243501649)])
    def test_golden(self, positives: int, expected: float) -> None:
        """AVID's official code, on scores: row b's query picks out the b-th element."""
        scores = torch.cat([det(3, positives, a=0.37), det(3, 5, a=0.53)], 1).float() / 0.07
        query = torch.eye(3)
        bank = (scores[..., None] * query[:, None]).flatten(0, 1)
        index = torch.arange(scores.numel()).view(scores.shape)
        positive, negative = index[:, :positives], index[:, positives:]
        z = noise_log_partition(query, bank, negative, scale=1.0)
        assert float(z.exp()) == pytest.approx(265336.29981368, rel=2e-5)
        loss = partition_nce(query, bank, positive, negative, scale=1.0, log_partition=z, backend="triton")
        assert float(loss) == pytest.approx(expected, rel=2e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", ["one", "tiny", "ragged"])
    def test_against_float64(self, dtype: torch.dtype, shape: str) -> None:
        for masked, scale in ((False, 100.0), (True, 14.3)):
            judge(make_inputs(SHAPES[shape], dtype=dtype, masked=masked, scale=scale), dtype)

    @pytest.mark.parametrize("programs", [1, 4, 10_000])
    def test_any_number_of_parts(self, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Spans that begin and end among the positives, at their end, and among the negatives."""
        monkeypatch.setattr(triton_kernel, "PROGRAMS", programs)
        judge(make_inputs(Shape(2, 40, 7, 19, 38), masked=True), torch.float32)

    def test_without_a_gradient(self) -> None:
        arguments = make_inputs(SHAPES["ragged"], masked=True)
        with torch.no_grad():
            value = partition_nce(**arguments, backend="triton")
        assert torch.equal(value, partition_nce(**arguments, backend="triton").detach())

    def test_same_bits_twice(self) -> None:
        arguments = make_inputs(SHAPES["ragged"], dtype=torch.bfloat16, masked=True)
        first, second = (
            value_and_gradients(partial(partition_nce, backend="triton"), arguments) for _ in range(2)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestEdges:
    def test_nan_reaches_the_output(self) -> None:
        for where in ("query", "bank", "scale"):
            arguments = make_inputs(Shape(3, 4, 5, 2, 40))
            with torch.no_grad():
                arguments[where].view(-1)[0] = math.nan
            found = value_and_gradients(partial(partition_nce, backend="triton"), arguments)
            assert all(value.isnan().any() for value in found.values()), where

    def test_what_does_not_count_may_be_nan(self) -> None:
        arguments = make_inputs(Shape(3, 30, 5, 2, 6))
        arguments["positive_index"] = torch.tensor([[0, 29], [1, 29], [29, 29]])
        arguments["negative_index"] = torch.arange(2, 20).view(3, 6)
        arguments["positive_mask"] = torch.tensor([[True, False], [True, False], [False, False]])
        with torch.no_grad():
            arguments["query"][2] = math.nan
            arguments["bank"][14:] = math.nan
        found = value_and_gradients(partial(partition_nce, backend="triton"), arguments)
        assert all(value.isfinite().all() for value in found.values())
        assert not found["d query"][2].any()

    def test_everything_masked_and_nothing_at_all(self) -> None:
        arguments = make_inputs(SHAPES["tiny"], masked=True)
        arguments["positive_mask"] = torch.zeros_like(arguments["positive_mask"])
        found = value_and_gradients(partial(partition_nce, backend="triton"), arguments)
        assert all(not value.any() for value in found.values())
        empty = {k: arguments[k][:0] for k in ("query", "positive_index", "negative_index")}
        assert not partition_nce(**{**arguments, **empty, "positive_mask": None}, backend="triton").any()

    def test_strided_bank(self) -> None:
        arguments = make_inputs(SHAPES["ragged"])
        wide = torch.cat([arguments["bank"], arguments["bank"]], 1)[:, :19]
        found = partition_nce(**{**arguments, "bank": wide}, backend="triton")
        assert torch.equal(found, partition_nce(**arguments, backend="triton"))
