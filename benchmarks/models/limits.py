"""Peak memory of a training step, and the largest batch whose peak stays within a limit: both measured."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .steps import step

GIB = 2**30
REFUSALS = (torch.cuda.OutOfMemoryError, MemoryError)


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _child(answer: Connection, name: str, variant: str, batch: int, threads: int, limit: int | None) -> None:
    torch.set_num_threads(threads)
    if limit is not None:
        # A batch far beyond the limit must not take the machine's memory. Address space is more than what is resident, and
        # the peak decides: this bound is a loose one.
        space = _status("VmSize") + limit + GIB
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    try:
        step(name, variant, batch, "cpu")()
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error) and not isinstance(error, MemoryError):
            answer.send(error)
            return
        answer.send(None)
        return
    answer.send(_status("VmHWM"))


def _cpu_peak(name: str, variant: str, batch: int, limit: int | None) -> int:
    # Forked from a process that has imported everything and computed nothing: a fresh heap, without the seconds of an import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.models.limits"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_child, args=(sender, name, variant, batch, torch.get_num_threads(), limit)
    )
    child.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        # An allocation that fails inside a library ends its process.
        found = None
    finally:
        child.join()
        receiver.close()
    if isinstance(found, BaseException):
        raise found
    if found is None:
        raise MemoryError(f"batch {batch} needs more memory than it was given")
    return int(found)


def _cuda_peak(name: str, variant: str, batch: int) -> int:
    try:
        train = step(name, variant, batch, "cuda")
        torch.cuda.reset_peak_memory_stats()
        train()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    finally:
        train = None  # type: ignore[assignment]
        torch.cuda.empty_cache()


def peak(name: str, variant: str, batch: int, device: str, limit: int | None = None) -> int:
    """Bytes at the peak of a step, model and optimiser included.

    On a GPU the allocator's; on a CPU all that a process of its own holds, libraries included.

    Raises:
        MemoryError, torch.cuda.OutOfMemoryError: the step does not fit, on a CPU into `limit` and some slack.
    """
    return _cuda_peak(name, variant, batch) if device == "cuda" else _cpu_peak(name, variant, batch, limit)


def fits(name: str, variant: str, batch: int, device: str, limit: int) -> bool:
    """Whether the measured peak of a step stays within the limit."""
    try:
        return peak(name, variant, batch, device, limit) <= limit
    except REFUSALS:
        return False


def largest(fit: Callable[[int], bool], start: int) -> int:
    """The largest batch for which `fit` holds, to one sixteenth: by doubling (or halving) from `start`, then bisecting.

    Returns:
        0 where not even a batch of 2 fits.
    """
    low, high = 0, start
    while fit(high):
        low, high = high, 2 * high
    while low == 0:
        if high <= 2:
            return 0
        low, high = (high // 2, high) if fit(high // 2) else (0, high // 2)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low
