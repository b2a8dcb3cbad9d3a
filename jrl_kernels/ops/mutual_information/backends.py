"""The implementations of the bounds of the mutual information."""

from __future__ import annotations

from ... import _dispatch

BACKENDS = _dispatch.table(
    "mutual_information",
    _dispatch.reference(f"{__package__}.reference"),
    _dispatch.cpu(f"{__package__}.cpu", "mutual_information_softplus_f32_cpu"),
    _dispatch.triton(f"{__package__}.triton_kernel"),
)
