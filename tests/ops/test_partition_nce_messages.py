"""Every error message of partition_nce and noise_log_partition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from jrl_kernels import noise_log_partition, partition_nce

QUERY, BANK = torch.randn(4, 3), torch.randn(9, 3)


POSITIVE, NEGATIVE = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 5, dtype=torch.int64)


GOOD: dict[str, Any] = {
    "query": QUERY,
    "bank": BANK,
    "positive_index": POSITIVE,
    "negative_index": NEGATIVE,
    "scale": 1.0,
    "log_partition": 0.0,
}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": 1.0}, TypeError, "query must be a tensor, got float 1.0"),
    ({"query": QUERY.long()}, TypeError, "query must be float32, bfloat16, float16 or float64"),
    ({"query": QUERY[0]}, ValueError, r"query must have shape \[B, D\], got \[3\]"),
    ({"bank": BANK[:, :2]}, ValueError, r"bank must have shape \[N, D\] with D = 3, got \[9, 2\]"),
    ({"bank": BANK.double()}, TypeError, "bank must be torch.float32 like query, got torch.float64"),
    ({"bank": BANK.to("meta")}, ValueError, "bank must be on cpu like query, got meta"),
    ({"bank": BANK.clone().requires_grad_()}, ValueError, "bank has no gradient and must not require one"),
    ({"negative_index": NEGATIVE.int()}, TypeError, "negative_index must be int64, got torch.int32"),
    ({"negative_index": NEGATIVE[0]}, ValueError, r"negative_index must have shape \[B, Q\].*got \[5\]"),
    ({"negative_index": NEGATIVE[:3]}, ValueError, r"negative_index must have shape \[B, Q\] with B = 4"),
    ({"negative_index": NEGATIVE - 2}, ValueError, r"negative_index must hold indices in \[0, 9\)"),
    ({"negative_index": NEGATIVE.to("meta")}, ValueError, "negative_index must be on cpu like query"),
    ({"scale": "1"}, TypeError, "scale must be a number or a 0-d tensor, got str '1'"),
]


LOSS_ALONE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"positive_index": 3}, TypeError, "positive_index must be a tensor, got int 3"),
    ({"positive_index": POSITIVE.int()}, TypeError, "positive_index must be int64, got torch.int32"),
    ({"positive_index": POSITIVE + 9}, ValueError, r"positive_index must hold indices in \[0, 9\)"),
    ({"positive_index": POSITIVE[:, :0]}, ValueError, r"positive_index must have at least one column, got \[4, 0\]"),
    ({"negative_index": NEGATIVE[:, :0]}, ValueError, r"negative_index must have at least one column, got \[4, 0\]"),
    ({"positive_mask": POSITIVE}, TypeError, "positive_mask must be boolean"),
    ({"positive_mask": POSITIVE[:3] == 0}, ValueError, r"positive_mask must have shape \[B, K\] with B = 4"),
    ({"positive_mask": NEGATIVE == 0}, ValueError, r"positive_index must have shape \[B, K\] with .*K = 5"),
    ({"positive_mask": (POSITIVE == 0).to("meta")}, ValueError, "positive_mask must be on cpu like query"),
    ({"log_partition": None}, TypeError, "log_partition must be a number or a 0-d tensor, got NoneType None"),
    ({"log_partition": QUERY}, ValueError, "log_partition must be a 0-d tensor or a number"),
    ({"log_partition": torch.zeros((), requires_grad=True)}, ValueError, "log_partition is a constant"),
    ({"backend": "cudnn"}, ValueError, "backend must be 'auto' or one of .*got 'cudnn'"),
]  # fmt: skip


def noise(**given: Any) -> torch.Tensor:
    return noise_log_partition(given["query"], given["bank"], given["negative_index"], scale=given["scale"])


@pytest.mark.parametrize(
    ("function", "name", "changed", "error", "message"),
    [
        *((partition_nce, "partition_nce", *case) for case in [*BAD, *LOSS_ALONE]),
        *((noise, "noise_log_partition", *case) for case in BAD),
        (noise, "noise_log_partition", {"negative_index": NEGATIVE[:, :0]}, ValueError, r"at least one index, got \[4, 0\]"),
    ],
)  # fmt: skip
def test_messages(
    function: Callable[..., Any], name: str, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        function(**{**GOOD, **changed})


def test_a_width_beyond_the_triton_kernel_is_refused() -> None:
    from jrl_kernels.ops.partition_nce import triton_kernel

    wide = torch.zeros(1, triton_kernel.WIDEST + 1)
    index = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="takes D up to .*use backend='reference'"):
        triton_kernel.forward(wide, wide, index, index, None, torch.ones(()), torch.zeros(()), False)
