"""Every error message of word_region_scores and attention_critic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jrl_kernels import attention_critic, word_region_scores

R, W = torch.randn(2, 4, 3), torch.randn(3, 5, 3)


FULL = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.0, W), {}, TypeError, "regions must be a tensor, got float 1.0"),
        (
            (R.long(), W),
            {},
            TypeError,
            "regions must be float32, bfloat16, float16 or float64, got torch.int64",
        ),
        ((R[0], W), {}, ValueError, r"regions must have shape \[B, R, D\], got \[4, 3\]"),
        ((R, W[..., :2]), {}, ValueError, r"words must have shape \[C, T, D\] with D = 3, got \[3, 5, 2\]"),
        ((R, W.double()), {}, TypeError, "words must be torch.float32 like regions, got torch.float64"),
        ((R, W.to("meta")), {}, ValueError, "words must be on cpu like regions, got meta"),
        ((R[:, :0], W), {}, ValueError, r"regions must have at least one on axis R, got \[2, 0, 3\]"),
        ((R, W[:, :0]), {}, ValueError, r"words must have at least one on axis T, got \[3, 0, 3\]"),
        (
            (R, W),
            {"region_values": R[:1]},
            ValueError,
            r"region_values must have shape \[B, R, D\] with B = 2, R = 4, D = 3, got \[1, 4, 3\]",
        ),
        ((R, W), {"word_values": W[..., :2]}, ValueError, r"word_values must have shape \[C, T, D\] with"),
        (
            (R, W),
            {"region_values": R[..., :2], "word_values": W},
            ValueError,
            r"word_values must have shape \[C, T, E\] with C = 3, T = 5, E = 2, got \[3, 5, 3\]",
        ),
        ((R, W), {"region_values": R.half()}, TypeError, "region_values must be torch.float32 like regions"),
        ((R, W), {"word_values": 1}, TypeError, "word_values must be a tensor, got int 1"),
        (
            (R, W),
            {"region_mask": FULL.float()},
            TypeError,
            "region_mask must be boolean, True for items that count",
        ),
        (
            (R, W),
            {"region_mask": FULL[:1]},
            ValueError,
            r"region_mask must have shape \[B, R\] with B = 2, R = 4",
        ),
        ((R, W), {"word_mask": FULL}, ValueError, r"word_mask must have shape \[C, T\] with C = 3, T = 5"),
        ((R, W), {"region_mask": FULL.to("meta")}, ValueError, "region_mask must be on cpu like regions"),
        ((R, W), {"normalize": 1}, TypeError, "normalize must be True or False, got int 1"),
        ((R, W), {"hard": "yes"}, TypeError, "hard must be True or False, got str 'yes'"),
        ((R, W), {"prenormalize": "l3norm"}, ValueError, r"prenormalize must be one of \['none', 'softmax'"),
        ((R, W), {"match": "l2"}, ValueError, r"match must be one of \['cosine', 'dot'\], got 'l2'"),
        ((R, W), {"pool": "median"}, ValueError, r"pool must be one of \['sum', 'mean', 'max', 'logsumexp'"),
        ((R, W), {"attend": "both"}, ValueError, r"attend must be one of \['regions', 'words'\], got 'both'"),
        ((R, W), {"preset": "clip"}, ValueError, r"preset must be one of \['xmc_gan', 'damsm'.*got 'clip'"),
        (
            (R, W),
            {"attention_scale": "5"},
            TypeError,
            "attention_scale must be a number or a 0-d tensor, got str",
        ),
        ((R, W), {"attention_scale": float("nan")}, ValueError, "attention_scale must be finite, got nan"),
        ((R, W), {"pool_scale": 0}, ValueError, "pool_scale must be finite and greater than 0, got 0"),
        ((R, W), {"pool_scale": R}, ValueError, r"pool_scale must be a 0-d tensor or a number, got shape"),
        ((R, W), {"scale": True}, TypeError, "scale must be a number or a 0-d tensor, got bool True"),
        ((R, W), {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ((R, W), {"backend": "cudnn"}, ValueError, "backend must be 'auto' or one of .*got 'cudnn'"),
    ],
)
def test_messages(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^word_region_scores: {message}"):
        word_region_scores(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((R[0], R, W, W), {}, ValueError, r"keys must have shape \[B, R, D\], got \[4, 3\]"),
        ((R, R, W[..., :2], W), {}, ValueError, r"queries must have shape \[C, T, D\] with D = 3"),
        ((R, None, W, W), {}, TypeError, "region_values must be a tensor, got NoneType None"),
        ((R, R, W, None), {}, TypeError, "word_values must be a tensor, got NoneType None"),
        (
            (R, R, W, W.half()),
            {},
            TypeError,
            "word_values must be torch.float32 like keys, got torch.float16",
        ),
        ((R, R, W, W), {"scale": "1"}, TypeError, "scale must be a number or a 0-d tensor, got str '1'"),
        (
            (R, R, W, W),
            {"scale": None},
            TypeError,
            "scale must be a number or a 0-d tensor, got NoneType None",
        ),
    ],
)
def test_messages_of_the_critic(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^attention_critic: {message}"):
        attention_critic(*arguments, **options)
