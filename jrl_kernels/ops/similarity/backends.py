"""The implementations of the similarity ops."""

from __future__ import annotations

from ... import _dispatch

BACKENDS = _dispatch.table(
    "similarity",
    _dispatch.reference(f"{__package__}.reference"),
    _dispatch.cpu(f"{__package__}.cpu", "similarity_count_f32_cpu"),
    _dispatch.cuda(f"{__package__}.cuda", "similarity_count_cuda"),
    _dispatch.triton(f"{__package__}.triton_kernel"),
)

ORDER_BACKENDS = _dispatch.table(
    "similarity_matrix", *(BACKENDS[name] for name in ("reference", "cpu", "triton"))
)
