"""What the losses across ranks send and hold, measured on gloo processes of this machine: `python -m benchmarks.ranks --write`.

Bytes are counted at torch.distributed's own functions, memory at torch's allocator. Both depend on sizes alone and not on the
machine's speed, so any CPU will do. Of times only one is taken, what share of the gather form its collectives have between two
processes: more of them would share cores, and none of it says anything of a cluster.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

from jrl_kernels import distributed

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
MARKS = "<!-- measured by benchmarks.ranks -->\n", "<!-- end -->\n"
MIB = 2**20
LOSSES: dict[str, Callable[..., Any]] = {
    "info_nce": distributed.info_nce,
    "sigmoid_contrastive": lambda *sides, **options: distributed.sigmoid_contrastive(
        *sides, bias=-10.0, **options
    ),
}


@contextmanager
def received() -> Iterator[list[int]]:
    """Bytes that come from other ranks, one number a collective."""
    counts: list[int] = []
    size = dist.get_world_size()

    def bytes_of(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def counted(name: str, count: Callable[..., int]) -> Any:
        original = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts.append(count(*arguments))
            return original(*arguments, **options)

        return mock.patch.object(dist, name, call)

    with ExitStack() as stack:
        # an all-gather's and an all-to-all's result, and a reduce-scatter's operand, have a part of each rank
        for name in ("all_gather_single", "all_gather_into_tensor", "all_to_all_single"):
            if hasattr(dist, name):
                stack.enter_context(counted(name, lambda out, *_: bytes_of(out) * (size - 1) // size))
        for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
            if hasattr(dist, name):
                stack.enter_context(counted(name, lambda _, given, *__: bytes_of(given) * (size - 1) // size))
        stack.enter_context(
            counted(
                "batch_isend_irecv",
                lambda operations: sum(bytes_of(o.tensor) for o in operations if o.op is dist.irecv),
            )
        )
        yield counts


def peak(run: Callable[[], Any]) -> int:
    """Bytes that torch's allocator holds at most during `run`, beyond those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    held = most = 0
    events = found.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del kept
    return most


def fastest(run: Callable[[], Any], times: int = 7) -> float:
    """Seconds of the fastest run, which other work on the machine has slowed least."""
    found = []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        run()
        dist.barrier()
        found.append(time.perf_counter() - start)
    return min(found)


def share_of_collectives(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Seconds of the gather and the reduce-scatter alone, and of the whole loss with its gradients."""
    every = torch.zeros(dist.get_world_size() * len(y), y.shape[1])

    def collectives() -> None:
        dist.all_gather_into_tensor(every, y.detach())
        dist.reduce_scatter_tensor(torch.empty_like(y), every)

    return fastest(collectives), fastest(
        lambda: torch.autograd.grad(distributed.info_nce(x, y, scale=20.0), (x, y))
    )


def rank_main(rank: int, size: int, store: str, out: str, rows: int, width: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    generator = torch.Generator().manual_seed(rank)
    x, y = (
        torch.nn.functional.normalize(torch.randn(rows // size, width, generator=generator), dim=1)
        for _ in range(2)
    )
    x.requires_grad_()
    y.requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    results: dict[str, tuple[float, ...]] = {}
    for name, loss in LOSSES.items():
        for form in ("gather", "ring"):

            def forward(loss: Callable[..., Any] = loss, form: str = form) -> torch.Tensor:
                found: torch.Tensor = loss(x, y, scale=scale, form=form)
                return found

            with received() as counts:
                value = forward()
                there = sum(counts)
                torch.autograd.grad(value, (x, y, scale))
                back = sum(counts) - there
            memory = peak(lambda: torch.autograd.grad(forward(), (x, y, scale)))
            results[f"{name} {form}"] = there, back, memory
    if size == 2:
        results["times"] = share_of_collectives(x, y)
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def table(rows: int, width: int, sizes: list[int]) -> str:
    lines = [
        f"N = {rows:,} pairs in all, D = {width}, float32: the y of all ranks is {rows * width * 4 / MIB:.1f} MiB.",
        "",
        "| loss, form | ranks | rows a rank | received, forward | received, backward | memory at the peak |",
        "|---|---|---|---|---|---|",
    ]
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "results.json")
            mp.spawn(rank_main, (size, str(Path(folder, "store")), str(out), rows, width), nprocs=size)
            found[size] = json.loads(out.read_text())
    for name in (f"{loss} {form}" for loss in LOSSES for form in ("gather", "ring")):
        for size in sizes:
            there, back, memory = (value / MIB for value in found[size][name])
            loss, form = name.split()
            lines.append(
                f"| `{loss}`, {form} | {size} | {rows // size:,} | {there:.2f} MiB | {back:.2f} MiB | {memory:.1f} MiB |"
            )
    if 2 in found:
        alone, whole = found[2]["times"]
        lines += [
            "",
            f"Between 2 processes of one thread each, the gather and the reduce-scatter alone take {1e3 * alone:.0f} ms of the "
            f"{1e3 * whole:.0f} ms of",
            f"`info_nce`'s gather form, forward and backward: {alone / whole:.1%}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="pairs of all ranks")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    found = table(arguments.rows, arguments.width, arguments.ranks)
    print(found)
    if arguments.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n{found}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
