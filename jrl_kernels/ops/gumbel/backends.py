"""The implementations of the Gumbel ops."""

from __future__ import annotations

from ... import _dispatch

BACKENDS = _dispatch.table(
    "gumbel",
    _dispatch.reference(f"{__package__}.reference"),
    _dispatch.cpu(f"{__package__}.cpu", "gumbel_assign_statistics_f32_cpu"),
    _dispatch.triton(f"{__package__}.triton_kernel"),
)
