"""Every error message of the Gumbel ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jrl_kernels import gumbel_assign, gumbel_embed

Q, K, V = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6)


LOGITS, CODES = torch.randn(3, 7), torch.randn(7, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, K, V), {}, TypeError, "queries must be a tensor, got int 3"),
        (
            (Q.int(), K, V),
            {},
            TypeError,
            "queries must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        ((Q[0], K, V), {}, ValueError, r"queries must have shape \[B, G, D\], got \[3, 4\]"),
        (
            (Q, K[:1], V),
            {},
            ValueError,
            r"keys must have shape \[B, S, D\] with B = 2, D = 4, got \[1, 5, 4\]",
        ),
        (
            (Q, K, V[:, :4]),
            {},
            ValueError,
            r"values must have shape \[B, S, E\] with B = 2, S = 5, got \[2, 4, 6\]",
        ),
        ((Q[:, :0], K, V), {}, ValueError, r"queries must have a group and a width, got shape \[2, 0, 4\]"),
        ((Q, K.half(), V), {}, TypeError, "keys must be torch.float32 like queries, got torch.float16"),
        ((Q, K, V.half()), {}, TypeError, "values must be torch.float32 like queries, got torch.float16"),
        ((Q, K, V), {"tau": 0}, ValueError, "tau must be finite and greater than 0, got 0"),
        ((Q, K, V), {"tau": "1"}, TypeError, "tau must be a number, got str '1'"),
        ((Q, K, V), {"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        (
            (Q, K, V),
            {"scale": Q},
            ValueError,
            r"scale must be a 0-d tensor or a number, got shape \[2, 3, 4\]",
        ),
        ((Q, K, V), {"noise": 1}, TypeError, "noise must be True or False, got int 1"),
        ((Q, K, V), {"seed": 1.5}, TypeError, "seed must be an int, got float 1.5"),
        ((Q, K, V), {"seed": -1}, ValueError, "seed must be at least 0"),
        ((Q, K, V), {"seed": 1 << 63}, ValueError, "seed must be at least 0 and at most 9223372036854775807"),
        (
            (Q, K, V),
            {"seed": torch.ones(1)},
            TypeError,
            "seed must be an int or an int64 tensor, got torch.float32",
        ),
        (
            (Q, K, V),
            {"seed": torch.ones(2).long()},
            ValueError,
            r"seed must be 0-d or have one element, got shape \[2\]",
        ),
        (
            (Q, K, V),
            {"key_mask": V},
            TypeError,
            "key_mask must be boolean, True for items that count, got torch.float32",
        ),
        (
            (Q, K, V),
            {"key_mask": torch.ones(2, 4) > 0},
            ValueError,
            r"key_mask must have shape \[B, S\] with B = 2, S = 5, got \[2, 4\]",
        ),
        ((Q, K, V), {"backend": "metal"}, ValueError, "backend must be 'auto' or one of"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^gumbel_assign: .*{message}"):
        gumbel_assign(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS, 3), {}, TypeError, "codebook must be a tensor, got int 3"),
        ((LOGITS, CODES[0]), {}, ValueError, r"codebook must have shape \[V, D\], got \[2\]"),
        ((None, CODES), {}, TypeError, "logits must be a tensor, got NoneType None"),
        (
            (LOGITS.int(), CODES),
            {},
            TypeError,
            "logits must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        (
            (LOGITS[:, :6], CODES),
            {},
            ValueError,
            r"logits must have shape \[..., V\] with V = 7, got \[3, 6\]",
        ),
        (
            (LOGITS.double(), CODES),
            {},
            TypeError,
            "codebook must be float64 where logits is, got torch.float32",
        ),
        ((LOGITS, CODES), {"tau": -1.0}, ValueError, "tau must be finite and greater than 0, got -1.0"),
        ((LOGITS, CODES), {"k": 0}, ValueError, "k must be at least 1, got 0"),
        ((LOGITS, CODES), {"k": 8}, ValueError, "k must be at most V = 7, got 8"),
        ((LOGITS, CODES), {"k": 2, "hard": False}, ValueError, "k must be 1 with hard=False, got 2"),
        ((LOGITS, CODES), {"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_messages_of_embed(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^gumbel_embed: .*{message}"):
        gumbel_embed(*arguments, **options)
