"""Every error message of mutual_information."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jrl_kernels import mutual_information

X = torch.randn(4, 3)


LOCAL = torch.randn(4, 2, 3)


MASK = torch.ones(4, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "x must be a tensor, got float 1.0"),
        ((X, None), {}, TypeError, "y must be a tensor, got NoneType None"),
        ((X.long(), X), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ((X[0], X), {}, ValueError, r"x must have shape \[N, D\], got \[3\]"),
        ((LOCAL[None], X), {}, ValueError, r"x must have shape \[N, L, D\], got \[1, 4, 2, 3\]"),
        ((X, X[:3]), {}, ValueError, r"y must have shape \[N, D\] with N = 4, D = 3, got \[3, 3\]"),
        ((X, LOCAL[..., :2]), {}, ValueError, r"y must have shape \[N, M, D\] with .*got \[4, 2, 2\]"),
        ((X, X.double()), {}, TypeError, "y must be torch.float32 like x, got torch.float64"),
        ((X, X.to("meta")), {}, ValueError, "y must be on cpu like x, got meta"),
        ((X, X), {"bound": "mine"}, ValueError, r"bound must be one of \['nce', 'jsd', 'dv'\], got 'mine'"),
        ((X, X), {"direction": "up"}, ValueError, "direction must be one of .*got 'up'"),
        ((X, X), {"scale": "1"}, TypeError, "scale must be a number or a 0-d tensor, got str '1'"),
        ((X, X), {"scale": X}, ValueError, r"scale must be a 0-d tensor or a number, got shape \[4, 3\]"),
        ((X, X), {"own_logit": "no"}, TypeError, "own_logit must be a number, got str 'no'"),
        ((X, X), {"own_logit": float("inf")}, ValueError, "own_logit must be finite, got inf"),
        ((X, X), {"own_logit": -10.0, "bound": "dv"}, ValueError, "own_logit must be None with bound='dv'"),
        (
            (X[:1], X[:1]),
            {"bound": "jsd"},
            ValueError,
            r"bound='jsd' contrasts images: x must hold at least 2",
        ),
        ((X[:0], X[:0]), {"bound": "dv"}, ValueError, r"bound='dv' contrasts images.*got \[0, 3\]"),
        (
            (X, LOCAL),
            {"x_mask": MASK},
            ValueError,
            r"x_mask needs local features x \[N, L, D\], got x \[4, 3\]",
        ),
        ((X, LOCAL), {"y_mask": MASK.int()}, TypeError, "y_mask must be boolean"),
        (
            (X, LOCAL),
            {"y_mask": MASK[:, :1]},
            ValueError,
            r"y_mask must have shape \[N, M\] with .*got \[4, 1\]",
        ),
        ((X, LOCAL), {"y_mask": MASK.to("meta")}, ValueError, "y_mask must be on cpu like y, got meta"),
        ((X, X), {"backend": "cudnn"}, ValueError, "backend must be 'auto' or one of .*got 'cudnn'"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^mutual_information: .*{message}"):
        mutual_information(*arguments, **options)
