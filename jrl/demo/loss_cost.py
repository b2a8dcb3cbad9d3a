"""Time and peak memory of the fused loss beside the loss as people write it in PyTorch."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jrl_kernels import info, info_nce

SIZES = (256, 512, 1024, 2048, 4096, 8192)
WIDTH = 512
_SCALE = 1 / 0.07
# N×N float32 arrays that the eager loss holds at its peak, rounded up: logits, log-probabilities, gradients
_EAGER_ARRAYS = 5
_MOST_REPEATS = 15

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss open-coded: the logits, and a cross-entropy over their rows and one over their columns."""
    logits = scale * x @ y.T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def fused_backend(device: str) -> tuple[str, str | None]:
    """The backend that serves the fused loss here, and why it is only the reference, if it is."""
    backends = info.collect()["ops"]["info_nce"]["backends"]
    wanted = "triton" if device == "cuda" else "cpu"
    chosen = os.environ.get("JRL_BACKEND") or (wanted if backends[wanted]["serves"] else "reference")
    if chosen != "reference":
        return chosen, None
    return chosen, backends[wanted]["reason"] or "JRL_BACKEND=reference"


def measure(
    sizes: Sequence[int] = SIZES, width: int = WIDTH, device: str = "cpu", budget: float = 35.0
) -> dict[str, Any]:
    """Forward and backward of both losses at several batch sizes.

    Args:
        sizes: batch sizes N.
        width: D of the embeddings.
        device: "cpu" or "cuda".
        budget: seconds; sizes that would not fit into them are left out and named in "left_out".

    Returns:
        "rows": one a size, with `batch`, and for `fused` and `eager` the median seconds, their number of
        repeats and the peak of extra bytes (None where the system does not tell); "backend", "reference_because",
        "width", "dtype", "left_out": reasons by size.

    Raises:
        RuntimeError: the two losses disagree.
    """
    backend, because = fused_backend(device)

    def fused_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return info_nce(x, y, scale=scale, backend=backend)

    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    start = time.perf_counter()
    expected = 0.0
    for position, size in enumerate(sizes):
        needed = _EAGER_ARRAYS * 4 * size * size
        free = _free_memory(device)
        remaining = budget - (time.perf_counter() - start)
        if free is not None and needed > free:
            left_out[str(size)] = f"the eager loss needs {needed >> 20} MiB, {free >> 20} MiB are free"
            continue
        if rows and expected > remaining:
            left_out[str(size)] = f"the {budget:.0f} seconds set aside for this were spent"
            continue
        inputs = _inputs(size, width, device)
        steps = {"fused": _step(fused_loss, inputs), "eager": _step(eager_loss, inputs)}
        _check(size, fused_loss, inputs)
        if not rows:
            for step in steps.values():
                step()
        began = time.perf_counter()
        memory = {name: extra_memory(step, device) for name, step in steps.items()}
        pair = time.perf_counter() - began
        share = remaining / (3 * (len(sizes) - position))
        repeats = max(1, min(_MOST_REPEATS, int(share / pair)))
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            # in turn, so that a machine that slows down slows both
            for name, step in steps.items():
                times[name].append(_seconds(step, device))
        rows.append(
            {
                "batch": size,
                "repeats": repeats,
                **{
                    name: {"seconds": statistics.median(times[name]), "extra_bytes": memory[name]}
                    for name in steps
                },
            }
        )
        # two calls of each at least, and four times the work at twice the size
        expected = 8 * sum(statistics.median(seconds) for seconds in times.values())
    return {
        "rows": rows,
        "backend": backend,
        "reference_because": because,
        "width": width,
        "dtype": "float32",
        "left_out": left_out,
    }


def extra_memory(step: Callable[[], Any], device: str) -> int | None:
    """Peak of the bytes that one call takes beyond what was held before it; None where the system does not tell.

    The first call ever also loads libraries, so it is not the one to measure.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _reset_peak():
        step()
        return None
    before = _kibibytes("/proc/self/status", "VmRSS")
    step()
    return max(0, _kibibytes("/proc/self/status", "VmHWM") - before) * 1024


def _reset_peak() -> bool:
    if platform.system() != "Linux":
        return False
    try:
        # freed memory that the C library keeps would hide what the step asks for
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def _inputs(size: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x, y = (F.normalize(torch.randn(size, width, generator=generator), dim=1) for _ in range(2))
    scale = torch.tensor(_SCALE, device=device, requires_grad=True)
    return x.to(device).requires_grad_(), y.to(device).requires_grad_(), scale


def _step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


@torch.no_grad()
def _check(size: int, fused_loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    fused, eager = float(fused_loss(*inputs)), float(eager_loss(*inputs))
    if not math.isclose(fused, eager, rel_tol=1e-3):
        raise RuntimeError(f"at batch {size} the fused loss is {fused}, the eager one {eager}")


def _seconds(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _free_memory(device: str) -> int | None:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    if platform.system() != "Linux":
        return None
    free = _kibibytes("/proc/meminfo", "MemAvailable") * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _kibibytes(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{file} has no {field}")
