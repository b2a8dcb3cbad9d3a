"""The implementations of word-region attention."""

from __future__ import annotations

from ... import _dispatch

BACKENDS = _dispatch.table(
    "word_region",
    _dispatch.reference(f"{__package__}.reference"),
    _dispatch.cpu(f"{__package__}.cpu", "word_region_attend_f32_cpu"),
    _dispatch.triton(f"{__package__}.triton_kernel"),
)
