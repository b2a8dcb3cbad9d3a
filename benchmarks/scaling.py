"""`python -m benchmarks.scaling [--op info_nce] [--device cpu] [--out DIR]`

How the cost of the ops grows with each axis of their shape. Sizes grow geometrically, one axis at a time; ours and eager PyTorch
take turns over all sizes, and a line through the logarithms of size and time gives the exponent, beside the one that the op's
`flops` has over the same sizes. Against the batch the extra memory is fitted too. The figures join what DIR/results.json holds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .measure import Step, extra_memory, interleave, machine
from .plots import draw
from .run import commit, disagreement, save
from .workloads import WORKLOADS, Workload
from .workloads.workload import Function

Entry = dict[str, Any]
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


class Grid(NamedTuple):
    """An op's shape, and the sizes that replace some of its fields along each axis."""

    shape: dict[str, int]
    fields: dict[str, tuple[str, ...]]  # letter of the axis -> fields of the shape that grow together
    sizes: dict[str, tuple[int, ...]]
    memory: Mapping[str, float]  # exponents of ours and of eager's extra memory against the batch, at most


PAIRS = {"B": ("images", "captions"), "R": ("regions",), "T": ("words",), "D": ("width",)}
MATRIX = {"B": ("rows", "columns"), "D": ("width",)}
# Gradients grow with the batch, scores with its square: eager PyTorch holds all of them, ours only those that it returns.
SCORES_GO, SCORES_STAY, NO_PAIRS = {"jrl": 1, "eager": 2}, {"jrl": 2, "eager": 2}, {"jrl": 1, "eager": 1}


def _double(start: int, count: int = 4) -> tuple[int, ...]:
    return tuple(start << step for step in range(count))


GRIDS: dict[str, dict[str, Grid]] = {
    "cpu": {
        "info_nce": Grid(
            {"rows": 2048, "columns": 2048, "width": 256},
            MATRIX,
            {"B": _double(512), "D": _double(64)},
            SCORES_GO,
        ),
        "word_region_scores": Grid(
            {"images": 32, "captions": 32, "words": 16, "regions": 32, "width": 128},
            PAIRS,
            {"B": _double(8), "R": _double(16), "T": _double(8), "D": _double(64)},
            SCORES_STAY,
        ),
        "max_sim": Grid(
            {"images": 32, "captions": 32, "regions": 64, "words": 32, "width": 128},
            PAIRS,
            {"B": _double(16), "R": _double(32), "T": _double(16), "D": _double(64)},
            SCORES_STAY,
        ),
        "similarity_topk": Grid(
            {"rows": 4096, "columns": 4096, "width": 256},
            MATRIX,
            {"B": _double(1024), "D": _double(64)},
            SCORES_GO,
        ),
        "retrieval_ranks": Grid(
            {"rows": 4096, "columns": 4096, "width": 256},
            MATRIX,
            {"B": _double(1024), "D": _double(64)},
            SCORES_GO,
        ),
        "gumbel_assign": Grid(
            {"images": 16, "groups": 64, "tokens": 196, "depth": 384, "width": 384},
            {"B": ("images",), "S": ("tokens",)},
            {"B": _double(8), "S": _double(49)},
            NO_PAIRS,
        ),
    },
    "cuda": {
        "info_nce": Grid(
            {"rows": 16384, "columns": 16384, "width": 768},
            MATRIX,
            {"B": _double(4096), "D": _double(128)},
            SCORES_GO,
        ),
        "word_region_scores": Grid(
            {"images": 128, "captions": 128, "words": 32, "regions": 64, "width": 256},
            PAIRS,
            {"B": _double(32), "R": _double(32), "T": _double(16), "D": _double(128)},
            SCORES_STAY,
        ),
        "max_sim": Grid(
            {"images": 256, "captions": 256, "regions": 128, "words": 64, "width": 128},
            PAIRS,
            {"B": _double(64), "R": _double(64), "T": _double(32), "D": _double(64)},
            SCORES_STAY,
        ),
        "similarity_topk": Grid(
            {"rows": 32768, "columns": 32768, "width": 512},
            MATRIX,
            {"B": _double(8192), "D": _double(128)},
            SCORES_GO,
        ),
        "retrieval_ranks": Grid(
            {"rows": 32768, "columns": 32768, "width": 512},
            MATRIX,
            {"B": _double(8192), "D": _double(128)},
            SCORES_GO,
        ),
        "gumbel_assign": Grid(
            {"images": 128, "groups": 64, "tokens": 196, "depth": 384, "width": 384},
            {"B": ("images",), "S": ("tokens",)},
            {"B": _double(64), "S": _double(98)},
            NO_PAIRS,
        ),
    },
}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of the line of least squares through (log size, log cost).

    Args:
        sizes: positive, at least two of them different.
        costs: positive, one for each size.

    Returns:
        p of the power law cost = c * size ** p that fits best.

    Raises:
        ValueError: where no line is determined.
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError(f"expected a positive cost for each of two sizes or more, got {sizes} and {costs}")
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def step(function: Function, arguments: dict[str, Any], backward: bool) -> Step:
    """The forward, or the forward and the gradients of the sum of what it returns."""
    if not backward:
        detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        return lambda: function(**detached)
    leaves = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    return lambda: torch.autograd.grad(function(**arguments).sum(), leaves)


def functions(workload: Workload, device: str) -> dict[str, Function]:
    """Ours by the backend that "auto" takes, and eager PyTorch."""
    backend = next(name for name in BACKENDS[device] if name in workload.backends)
    return {f"jrl {backend}": partial(workload.ours, backend=backend), "eager": workload.peers["eager"]}


def along(op: str, grid: Grid, axis: str) -> list[Any]:
    """The shapes of an axis, which is "" for the one they start from."""
    start = WORKLOADS[op].parity
    start = start._replace(**{**dict.fromkeys(start._fields, 0), **grid.shape})
    if not axis:
        return [start]
    return [start._replace(**dict.fromkeys(grid.fields[axis], size)) for size in grid.sizes[axis]]


def steps_along(
    op: str, grid: Grid, axis: str, device: str, refused: dict[str, str]
) -> Iterator[tuple[str, int, Step]]:
    """Variant, size and what is to be measured, called once; why a variant's line is short or absent goes to `refused`."""
    workload, dtype = WORKLOADS[op], DTYPES[device]
    arguments = [workload.make_inputs(shape, dtype=dtype, device=device) for shape in along(op, grid, axis)]
    for variant, function in functions(workload, device).items():
        error = disagreement(function, workload, device, dtype)
        if not error <= TOLERANCE[dtype]:
            refused[variant] = f"disagrees with float64 by {error:.2g}"
            continue
        for size, given in zip(grid.sizes[axis], arguments, strict=True):
            call = step(function, given, workload.backward)
            try:
                call()
            except (torch.cuda.OutOfMemoryError, NotImplementedError) as reason:
                refused[variant] = f"{axis}={size}: {str(reason).splitlines()[0]}"
                break
            yield variant, size, call


def memory(op: str, grid: Grid, device: str) -> dict[str, dict[int, int]]:
    """Extra bytes of each variant by the size of its batch; empty where the system does not tell."""
    found: dict[str, dict[int, int]] = {}
    for variant, size, call in steps_along(op, grid, "B", device, {}):
        held = extra_memory(call, device)
        if held:
            found.setdefault(variant, {})[size] = held
    return found


def times(
    op: str, grid: Grid, axis: str, device: str, repeats: int, held: Mapping[str, Mapping[int, int]]
) -> list[Entry]:
    """The fit of each variant along one axis, with that of its memory where it is known; or why there is none."""
    workload = WORKLOADS[op]
    about = {
        "op": op,
        "axis": axis,
        "shape": list(along(op, grid, "")[0]),
        "dtype": str(DTYPES[device]).removeprefix("torch."),
        "pass": "forward+backward" if workload.backward else "forward",
    }
    refused: dict[str, str] = {}
    steps = {(variant, size): call for variant, size, call in steps_along(op, grid, axis, device, refused)}
    named = {f"{variant} {size}": call for (variant, size), call in steps.items()}
    timings = interleave(named, device, repeats=repeats, warmup=0)
    flops = {
        size: workload.cases.flops(shape, workload.backward)
        for size, shape in zip(grid.sizes[axis], along(op, grid, axis), strict=True)
    }
    entries: list[Entry] = [{**about, "variant": variant, "refused": why} for variant, why in refused.items()]
    for variant in functions(workload, device):
        sizes = [size for size in grid.sizes[axis] if (variant, size) in steps]
        if len(sizes) < 2:
            continue
        median = [timings[f"{variant} {size}"].median * 1e3 for size in sizes]
        entry: Entry = {
            **about,
            "variant": variant,
            "values": sizes,
            "milliseconds": median,
            "exponent": exponent(sizes, median),
            "expected": exponent(sizes, [flops[size] for size in sizes]),
        }
        weighed = held.get(variant, {})
        if all(size in weighed for size in sizes):
            entry["extra_bytes"] = [weighed[size] for size in sizes]
            entry["memory_exponent"] = exponent(sizes, entry["extra_bytes"])
            entry["memory_expected"] = grid.memory[variant.split()[0]]
        entries.append(entry)
    return entries


def measure(
    ops: Sequence[str], device: str, repeats: int = 5, grids: Mapping[str, Grid] | None = None
) -> list[Entry]:
    """The fits of several ops along every axis of their grids."""
    grids = grids or GRIDS[device]
    held = {op: memory(op, grids[op], device) if "B" in grids[op].sizes else {} for op in ops}
    return [
        entry
        for op in ops
        for axis in grids[op].sizes
        for entry in times(op, grids[op], axis, device, repeats, held[op] if axis == "B" else {})
    ]


def joined(path: Path, about: dict[str, Any], entries: list[Entry], ops: Sequence[str]) -> dict[str, Any]:
    """What the file holds, its fits of `ops` replaced.

    Raises:
        ValueError: where it holds figures of another machine or torch.
    """
    if not path.is_file():
        return {**about, "rates": {}, "rows": [], "scaling": entries}
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("device", "threads", "torch"):
        if result.get(key) != about[key]:
            raise ValueError(
                f"{path}: expected {key} {about[key]!r}, got {result.get(key)!r}: give another --out"
            )
    kept = [entry for entry in result.get("scaling", []) if entry["op"] not in ops]
    return {**result, "scaling": kept + entries}


def show(entries: list[Entry]) -> None:
    for entry in entries:
        case = f"{entry['op']:20} {entry['axis']} {entry['variant']:10}"
        if "refused" in entry:
            print(f"{case} refused: {entry['refused']}")
            continue
        line = f"{case} time {entry['exponent']:5.2f} (expected {entry['expected']:.2f})"
        if "memory_exponent" in entry:
            line += f"  memory {entry['memory_exponent']:5.2f} (at most {entry['memory_expected']:g})"
        print(line)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description="Fit how cost grows with each axis."
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--op", choices=sorted(GRIDS["cpu"]), action="append", help="one op (repeatable); all without it"
    )
    parser.add_argument("--out", type=Path, help="folder of the results.json that takes the fits")
    given = parser.parse_args(argv)
    ops = given.op or list(GRIDS[given.device])
    about = {**machine(given.device), "commit": commit()}
    path = given.out / "results.json" if given.out else None
    if path is not None:
        try:
            joined(path, about, [], ops)
        except ValueError as problem:
            # Before anything is measured.
            print(problem, file=sys.stderr)
            return 1
    entries = [{**entry, "commit": about["commit"]} for entry in measure(ops, given.device)]
    show(entries)
    if path is not None:
        # Read again: a run of another part may have written in the meantime.
        result = joined(path, about, entries, ops)
        save(result, path.parent)
        draw(result, path.parent)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
