"""The implementations of the contrastive losses, and the library that their operators are registered in."""

from __future__ import annotations

import torch

from ... import _dispatch

BACKENDS = _dispatch.table(
    "info_nce",
    _dispatch.reference(f"{__package__}.reference"),
    _dispatch.cpu(f"{__package__}.cpu", "info_nce_statistics_f32_cpu"),
    _dispatch.triton(f"{__package__}.triton_kernel"),
)

LIBRARY = torch.library.Library("jrl", "FRAGMENT")
