"""Which backend a call of the ranking losses gets, and every error message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jrl_kernels import ranking_loss, ranking_loss_from_scores


def test_auto_on_a_cpu_is_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from jrl_kernels import _dispatch

    monkeypatch.delenv("JRL_BACKEND", raising=False)
    assert _dispatch.select("ranking_loss", "auto", "ranking_loss", torch.randn(2, 2)) == "cpu"
    with pytest.raises(NotImplementedError, match="reference: never chosen"):
        _dispatch._select("ranking_loss", "auto", "ranking_loss", "cuda", torch.float64)


X = torch.randn(4, 3)


LONG = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "x must be a tensor, got float 1.0"),
        ((X.long(), X), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ((X[0], X), {}, ValueError, r"x must have shape \[rows, columns\], got \[3\]"),
        ((X, X[:, :2]), {}, ValueError, r"y must have shape \[rows, 3\], got \[4, 2\]"),
        ((X, X.double()), {}, TypeError, "y must be torch.float32 like x, got torch.float64"),
        ((X, X.to("meta")), {}, ValueError, "y must be on cpu like x, got meta"),
        ((X, X), {"negatives": [1.0]}, TypeError, r"negatives must be a tensor, got list"),
        ((X, X), {"negatives": X[:, :2]}, ValueError, r"negatives must have shape \[rows, 3\], got \[4, 2\]"),
        ((X, X), {"negatives": X.half()}, TypeError, "negatives must be torch.float32 like x"),
        ((X, X), {"negatives": X.to("meta")}, ValueError, "negatives must be on cpu like x, got meta"),
        ((X, X), {"margin": "1"}, TypeError, "margin must be a number, got str '1'"),
        ((X, X), {"margin": torch.tensor(0.2)}, TypeError, "margin must be a number, got torch.float32"),
        ((X, X), {"margin": -0.1}, ValueError, "margin must be at least 0, got -0.1"),
        ((X, X), {"margin": float("inf")}, ValueError, "margin must be finite, got inf"),
        ((X, X), {"hardest": 1}, TypeError, "hardest must be a bool, got int 1"),
        (
            (X, X),
            {"metric": "l2"},
            ValueError,
            r"metric must be one of \['cosine', 'dot', 'order'\], got 'l2'",
        ),
        ((X, X), {"direction": "up"}, ValueError, "direction must be one of"),
        ((X, X), {"reduction": "avg"}, ValueError, r"reduction must be one of \['sum', 'mean', 'none'\]"),
        ((X, X), {"backend": "cudnn"}, ValueError, r"backend must be 'auto' or one of .*got 'cudnn'"),
        ((X, X[:2]), {"exclude": LONG}, ValueError, "exclude as one tensor needs as many rows as columns"),
        ((X, X), {"exclude": (LONG, LONG, LONG)}, ValueError, "exclude has ids for negatives"),
        ((X, X), {"exclude": 3}, TypeError, "exclude must be int64 ids or a pair"),
        ((X, X), {"exclude": (LONG, LONG.int())}, TypeError, r"exclude\[1\] must be int64, got torch.int32"),
        ((X, X), {"exclude": (LONG, LONG[:2])}, ValueError, r"exclude\[1\] must have shape \[4\], got \[2\]"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^ranking_loss: .*{message}"):
        ranking_loss(*arguments, **options)


def test_messages_of_scores() -> None:
    with pytest.raises(ValueError, match=r"^ranking_loss_from_scores: scores must have shape"):
        ranking_loss_from_scores(X[0])
    with pytest.raises(TypeError, match=r"^ranking_loss_from_scores: scores must be float32"):
        ranking_loss_from_scores(X.long())
    with pytest.raises(ValueError, match=r"^ranking_loss_from_scores: exclude has ids for negatives"):
        ranking_loss_from_scores(X, exclude=(LONG, LONG[:3], LONG))
    with pytest.raises(ValueError, match=r"^ranking_loss_from_scores: margin must be at least 0"):
        ranking_loss_from_scores(X, margin=-1)
