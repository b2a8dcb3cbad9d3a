"""Time, memory and floors. Nothing here knows what is measured."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], Any]


class Timing(NamedTuple):
    median: float  # seconds
    low: float
    high: float
    repeats: int


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class CacheFlush:
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


def reason(error: BaseException) -> str:
    """One line of why something could not be measured."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return f"out of memory: {text}"
    if isinstance(error, (NotImplementedError, ImportError)):
        return text
    return f"{type(error).__name__}: {text}" if lines else text


def release(device: str) -> None:
    """Give back what a step that failed may still hold."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def interleave(
    steps: Mapping[str, Step],
    device: str,
    repeats: int | None = None,
    warmup: int = 1,
    *,
    seconds: float = 1.0,
    least: int = 5,
    failures: dict[str, str] | None = None,
) -> dict[str, Timing]:
    """Time every step in turn, so that a machine that slows down slows all of them.

    Args:
        steps: what is timed, by name.
        device: "cpu" or "cuda"; on a GPU the L2 is overwritten before each call.
        repeats: rounds; None for as many as take about `seconds` together, at least `least` and at most 200.
        warmup: calls of each before the first round.
        failures: takes the reason of a step that raises, which then has no timing; without it the error is raised.

    Returns:
        The timing of each step that did not fail.
    """
    flush = CacheFlush(device)
    spent: dict[str, list[float]] = {name: [] for name in steps}

    def attempt(name: str, call: Callable[[], float | None]) -> None:
        try:
            taken = call()
        except Exception as error:
            if failures is None:
                raise
            failures[name] = reason(error)
            del spent[name]
        else:
            if taken is not None:
                spent[name].append(taken)
            return
        release(device)

    def warm(step: Step) -> None:
        for _ in range(warmup):
            step()
        synchronize(device)

    def timed(step: Step) -> float:
        flush()
        return time_once(step, device)

    for name, step in steps.items():
        attempt(name, partial(warm, step))
    done = 0
    while spent and (repeats is None or done < repeats):
        for name in list(spent):
            attempt(name, partial(timed, steps[name]))
        done += 1
        if repeats is None:
            repeats = rounds(sum(times[0] for times in spent.values()), seconds, least)
    return {
        name: Timing(statistics.median(times), min(times), max(times), len(times))
        for name, times in spent.items()
    }


def rounds(once: float, seconds: float = 1.0, least: int = 5, most: int = 200) -> int:
    """How often to repeat what takes `once` seconds so that it takes about `seconds`, within limits."""
    return max(least, min(most, round(seconds / max(once, 1e-9))))


def capture(step: Step) -> tuple[Step, list[Tensor]]:
    """The step as a CUDA graph: its replay, and the outputs that each replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = tensors(step())
    return graph.replay, outputs


def tensors(result: Any) -> list[Tensor]:
    """The tensors of what a function returns."""
    return [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@contextlib.contextmanager
def steady_allocator() -> Iterator[None]:
    """Within it glibc gives every large block back at once.

    Otherwise it keeps those below a threshold that it moves up to 32 MiB, and a process's peak holds some sizes more often than
    others: the line would bend where the allocator does, not the op.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is None:
        yield
        return
    threshold = -3  # M_MMAP_THRESHOLD
    mallopt(threshold, 1 << 16)
    try:
        yield
    finally:
        mallopt(threshold, 32 << 20)


def extra_memory(step: Step, device: str) -> int | None:
    """Bytes beyond what is held before the call, at its peak: the allocator's count on a GPU, the process's on Linux.

    The second call counts. In it a function compiled with CUDA graphs records them, so that the allocator still sees what a graph
    keeps; the first holds what compilation and the choice of kernels take, and later ones ask the allocator for nothing.
    """
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
    # Freed memory that the allocator keeps would hide what the step asks for, and in a heap with holes it would be counted more
    # than once: a thread of its own has a heap without any.
    ctypes.CDLL(None).malloc_trim(0)
    with steady_allocator(), ThreadPoolExecutor(1) as thread:
        return thread.submit(_resident_growth, step).result()


def _resident_growth(step: Step) -> int:
    step()  # what a thread keeps for itself is not the step's
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


def processor() -> str:
    """The CPU's name."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine(device: str, libraries: Iterable[str] = ()) -> dict[str, Any]:
    """Names and versions that a result is meaningless without; of `libraries`, those that are installed."""
    found = {name: version(name) for name in sorted(set(libraries))}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cpu": processor(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "libraries": {name: number for name, number in found.items() if number is not None},
    }
