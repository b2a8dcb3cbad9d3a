"""What the launchers of Triton kernels share: the chip, the precision of float32 products, and a sound interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl

from . import _dispatch


def architecture(device: torch.device) -> int:
    """The major compute capability whose tile sizes serve a GPU: 8, 9 or 10."""
    major = torch.cuda.get_device_capability(device)[0]
    if major == 11:
        return 10
    # 12.x has the matrix instructions and the shared memory of 8.9.
    return major if major in (8, 9, 10) else 8


def precision(dtype: torch.dtype) -> str:
    """What multiplies matrices of `dtype`: "half", or for float32 "tf32" where PyTorch's setting allows it, else "ieee"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _mend_interpreter() -> None:
    """Work around three faults of Triton's interpreter, which otherwise stops or computes the wrong numbers."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Triton 3.6 calls int() on an array of one element, which NumPy 2.4 refuses: no loop to a run-time bound would start.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widen(handle: Any) -> Any:
        # bfloat16 lives in uint16 arrays, and the interpreter multiplies those integers; float32 has its bits on top.
        if handle.dtype.scalar.name != "bf16":
            return handle
        return replace(handle, data=(handle.data.astype(np.uint32) << 16).view(np.float32), dtype=tl.float32)

    def dot_of_floats(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return dot(self, widen(a), widen(b), *arguments)

    def cast_to_nearest(self: Any, source: Any, kind: Any) -> Any:
        # The interpreter cuts float32 off to bfloat16, where a GPU rounds to the nearest, ties to even.
        if source.dtype.scalar.name == "fp32" and kind.scalar.name == "bf16":
            bits = source.data.astype(np.float32).view(np.uint32)
            rounded = bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)
            rounded = (rounded & np.uint32(0xFFFF0000)).view(np.float32)
            source = replace(source, data=np.where(np.isnan(source.data), source.data, rounded))
        return cast(self, source, kind)

    interpreter._patch_lang_tensor = patch_with_index
    builder.create_dot = dot_of_floats
    builder.cast_impl = cast_to_nearest


if _dispatch.interpreting():
    _mend_interpreter()
