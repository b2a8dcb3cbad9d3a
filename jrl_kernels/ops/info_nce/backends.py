"""The implementations of the contrastive losses."""

from __future__ import annotations

from ... import _dispatch

BACKENDS = _dispatch.table(
    "info_nce",
    _dispatch.reference(f"{__package__}.reference"),
    _dispatch.cpu(f"{__package__}.cpu", "info_nce_statistics_f32_cpu"),
    _dispatch.triton(f"{__package__}.triton_kernel"),
)
