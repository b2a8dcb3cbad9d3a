"""The implementations of the ranking loss."""

from __future__ import annotations

from ... import _dispatch

BACKENDS = _dispatch.table(
    "ranking_loss",
    _dispatch.reference(f"{__package__}.reference"),
    _dispatch.cpu(f"{__package__}.cpu", "ranking_loss_sums_f32_cpu"),
    _dispatch.triton(f"{__package__}.triton_kernel"),
)
