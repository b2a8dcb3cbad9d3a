"""Results as tables in the terminal, and what could be measured as a list."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from . import peers
from .case import BACKENDS
from .workloads import WORKLOADS

Rows = list[dict[str, Any]]


def shape_of(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def show(title: str, columns: dict[str, str], lines: Iterable[Iterable[str]]) -> None:
    """A table whose columns are named with their side: "left" or "right"."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name, side in columns.items():
        table.add_column(name, justify="left" if side == "left" else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def table(rows: Rows) -> None:
    """What was timed, then what was refused and why."""
    left, right = (
        ("op", "shape", "dtype", "variant", "pass"),
        ("ms", "spread", "repeats", "TFLOP/s", "of floor"),
    )
    timed = [row for row in rows if "refused" not in row]
    columns = dict.fromkeys(left, "left") | dict.fromkeys((*right, "extra MiB", "error"), "right")
    show("benchmarks", columns, (_figures(row) for row in timed))
    refused = _refusals(rows)
    if refused:
        names = ("op", "dtype", "variant", "shapes", "reason")
        show("not measured", dict.fromkeys(names, "left"), refused)


def _figures(row: dict[str, Any]) -> list[str]:
    memory, error = row.get("extra_bytes"), row.get("error")
    return [
        row["op"],
        shape_of(row["shape"]),
        row["dtype"],
        row["variant"],
        row["pass"] + (", graph" if row.get("graph") else ""),
        f"{row['milliseconds']:.4g}",
        f"{row['low']:.4g}-{row['high']:.4g}",
        str(row["repeats"]),
        f"{row['tflops']:.3g}",
        f"{row['share_of_floor']:.0%}",
        "" if memory is None else f"{memory / 2**20:.1f}",
        "" if error is None else f"{error:.1e}",
    ]


def _refusals(rows: Rows) -> list[tuple[str, ...]]:
    """A line for each reason, with the shapes it holds for."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if "refused" in row:
            passes = [row["pass"]] if "pass" in row else []
            where = ", ".join([row["variant"], *passes, *(["graph"] if row.get("graph") else [])])
            found.setdefault((row["op"], row["dtype"], where, row["refused"]), []).append(
                shape_of(row["shape"])
            )
    return [(op, dtype, where, " ".join(shapes), why) for (op, dtype, where, why), shapes in found.items()]


def listing(ops: Iterable[str]) -> None:
    """Ops, shapes, our backends and peers, with whether each peer is installed and why not."""
    for op in ops:
        workload = WORKLOADS[op]
        print(op)
        for device, backends in BACKENDS.items():
            shapes = " ".join(shape_of(shape) for shape in workload.cases.BENCHMARK_SHAPES[device])
            ours = ", ".join(f"jrl {name}" for name in backends if name in workload.backends)
            print(f"  {device}: {shapes} ({ours})")
        compiled = ["compile"] if "eager" in workload.peers else []
        print(f"  in PyTorch: {', '.join([*workload.peers, *compiled])}")
        for name, peer in peers.PEERS.get(op, {}).items():
            function, version_or_reason = peers.installed(peer)
            state = "not installed: " if function is None else f"{peer.library} "
            print(f"  {name}: {state}{version_or_reason}")
