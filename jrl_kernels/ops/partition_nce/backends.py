"""The implementations of noise-contrastive estimation against a memory bank."""

from __future__ import annotations

from ... import _dispatch

BACKENDS = _dispatch.table(
    "partition_nce",
    _dispatch.reference(f"{__package__}.reference"),
    _dispatch.cpu(f"{__package__}.cpu", "partition_nce_f32_cpu"),
    _dispatch.triton(f"{__package__}.triton_kernel"),
)
