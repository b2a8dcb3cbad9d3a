"""The implementations of late interaction."""

from __future__ import annotations

from ... import _dispatch

BACKENDS = _dispatch.table(
    "max_sim",
    _dispatch.reference(f"{__package__}.reference"),
    _dispatch.cpu(f"{__package__}.cpu", "max_sim_forward_f32_cpu"),
    _dispatch.triton(f"{__package__}.triton_kernel"),
)
