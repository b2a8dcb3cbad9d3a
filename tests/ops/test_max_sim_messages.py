"""Which backend a call of late interaction gets, and every error message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jrl_kernels import max_sim, max_sim_varlen


def test_auto_on_a_cpu_is_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from jrl_kernels import _dispatch

    monkeypatch.delenv("JRL_BACKEND", raising=False)
    assert _dispatch.select("max_sim", "auto", "max_sim", torch.randn(2, 2)) == "cpu"


X = torch.randn(2, 4, 3)


ALL = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "regions must be a tensor, got float 1.0"),
        (
            (X.long(), X),
            {},
            TypeError,
            "regions must be float32, bfloat16, float16 or float64, got torch.int64",
        ),
        ((X[0], X), {}, ValueError, r"regions must have shape \[B, R, D\], got \[4, 3\]"),
        ((X, X[..., :2]), {}, ValueError, r"words must have shape \[C, T, D\] with D = 3, got \[2, 4, 2\]"),
        ((X, X.half()), {}, TypeError, "words must be torch.float32 like regions, got torch.float16"),
        ((X, X.to("meta")), {}, ValueError, "words must be on cpu like regions, got meta"),
        (
            (X, X),
            {"region_mask": ALL.long()},
            TypeError,
            "region_mask must be boolean, True for items that count",
        ),
        (
            (X, X),
            {"region_mask": ALL[:1]},
            ValueError,
            r"region_mask must have shape \[B, R\] with B = 2, R = 4",
        ),
        (
            (X, X[:, :3]),
            {"word_mask": ALL},
            ValueError,
            r"word_mask must have shape \[C, T\] with C = 2, T = 3",
        ),
        (
            (X, X),
            {"word_mask": ALL.to("meta")},
            ValueError,
            "word_mask must be on cpu like regions, got meta",
        ),
        ((X, X), {"reduce": "max"}, ValueError, r"reduce must be one of \['sum', 'mean'\], got 'max'"),
        (
            (X, X),
            {"direction": "up"},
            ValueError,
            r"direction must be one of \['words', 'regions', 'both'\], got 'up'",
        ),
        (
            (X, X),
            {"mask_mode": "min"},
            ValueError,
            r"mask_mode must be one of \['exclude', 'zero'\], got 'min'",
        ),
        ((X, X), {"backend": "cudnn"}, ValueError, r"backend must be 'auto' or one of .*, got 'cudnn'"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^max_sim: .*{message}"):
        max_sim(*arguments, **options)


ROWS = torch.randn(8, 3)


BOUNDS = torch.tensor([0, 3, 8])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, ROWS, BOUNDS, BOUNDS), {}, ValueError, r"regions must have shape \[N, D\], got \[2, 4, 3\]"),
        ((ROWS, ROWS[:, :2], BOUNDS, BOUNDS), {}, ValueError, r"words must have shape \[M, D\] with D = 3"),
        ((ROWS, ROWS, [0, 8], BOUNDS), {}, TypeError, "cu_seqlens_regions must be a tensor"),
        ((ROWS, ROWS, BOUNDS, BOUNDS.half()), {}, TypeError, "cu_seqlens_words must be int32 or int64, got torch.float16"),
        ((ROWS, ROWS, BOUNDS[:0], BOUNDS), {}, ValueError, r"cu_seqlens_regions must have shape \[sequences \+ 1\], got \[0\]"),
        ((ROWS, ROWS, BOUNDS, BOUNDS.to("meta")), {}, ValueError, "cu_seqlens_words must be on cpu like words, got meta"),
        ((ROWS, ROWS, BOUNDS[:2], BOUNDS), {}, ValueError, "cu_seqlens_regions must rise from 0 to 8, the number of rows"),
        ((ROWS, ROWS, BOUNDS, BOUNDS[1:]), {}, ValueError, "cu_seqlens_words must rise from 0 to 8"),
        ((ROWS, ROWS, BOUNDS[[0, 2, 1, 2]], BOUNDS), {}, ValueError, "cu_seqlens_regions must rise from 0 to 8"),
        ((ROWS, ROWS, BOUNDS, BOUNDS), {"max_seqlen_words": 4}, ValueError, "max_seqlen_words must be at least the longest"),
        ((ROWS, ROWS, BOUNDS, BOUNDS), {"max_seqlen_regions": 5.0}, TypeError, "max_seqlen_regions must be an int"),
        ((ROWS, ROWS, BOUNDS, BOUNDS), {"max_seqlen_regions": -1}, ValueError, "max_seqlen_regions must be at least 0"),
        ((ROWS, ROWS, BOUNDS, BOUNDS), {"direction": "up"}, ValueError, "direction must be one of"),
    ],
)  # fmt: skip
def test_messages_of_packed(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^max_sim_varlen: .*{message}"):
        max_sim_varlen(*arguments, **options)
