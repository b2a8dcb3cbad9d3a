"""Time, memory and floors. Nothing here knows what is measured."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Step = Callable[[], Any]


class Timing(NamedTuple):
    median: float  # seconds
    low: float
    high: float
    repeats: int


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class _CacheFlush:
    """Overwrites a buffer larger than the GPU's L2, so that no variant finds its inputs there."""

    def __init__(self, device: str) -> None:
        size = 0
        if device == "cuda":
            size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device) if size else None

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def time_once(step: Step, device: str) -> float:
    """Seconds of one call: events on a GPU, the wall clock on a CPU."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(steps: dict[str, Step], device: str, repeats: int, warmup: int) -> dict[str, Timing]:
    """Time every step in turn, `repeats` times round, so that a machine that slows down slows all of them."""
    flush = _CacheFlush(device)
    for step in steps.values():
        for _ in range(warmup):
            step()
    synchronize(device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            flush()
            seconds[name].append(time_once(step, device))
    return {
        name: Timing(statistics.median(times), min(times), max(times), len(times))
        for name, times in seconds.items()
    }


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def extra_memory(step: Step, device: str) -> int | None:
    """Bytes beyond what is held before the call, at its peak: the allocator's count on a GPU, the process's on Linux."""
    step()
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return None
    # Freed memory that the allocator keeps would hide what the step asks for.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    step()
    return max(0, _resident("VmHWM") - before)


class Rates(NamedTuple):
    """What this machine does at best, measured in the same run."""

    flops: float  # per second, of a matrix product
    bytes: float  # per second, read and written, of a copy


def machine_rates(device: str, dtype: torch.dtype) -> Rates:
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    big = torch.empty(1 << (30 if device == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(big)
    found = interleave(
        {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(big)},
        device,
        repeats=5,
        warmup=2,
    )
    return Rates(2 * side**3 / found["product"].median, 2 * big.numel() / found["copy"].median)


def machine(device: str) -> dict[str, Any]:
    """Name and versions that a result is meaningless without."""
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": name,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
