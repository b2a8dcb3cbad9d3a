"""Functions of one score, or of a tile's rows, that several ops' Triton kernels need."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import LN_2, LOG2_E, finite_or_zero


@triton.jit
def softplus(s):
    """log(1 + exp(s)), also where exp(s) is lost in 1 + exp(s)."""
    small = tl.exp2(-tl.abs(s) * LOG2_E)
    series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0 - small * (0.25 - small * 0.2))))
    return tl.where(s > 0.0, s, 0.0) + tl.where(small < 0.05, series, tl.log2(1.0 + small) * LN_2)


@triton.jit
def sigmoid(s):
    return 1.0 / (1.0 + tl.exp2(-s * LOG2_E))


@triton.jit
def log_sum_exp(s, AXIS: tl.constexpr):
    """-inf where all are -inf, inf where any is inf, NaN where any is NaN."""
    reference = finite_or_zero(tl.max(s, AXIS)) * LOG2_E
    total = tl.sum(tl.exp2(s * LOG2_E - tl.expand_dims(reference, AXIS)), AXIS)
    return (reference + tl.log2(total)) * LN_2
