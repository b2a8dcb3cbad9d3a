"""`python -m benchmarks.run [--op info_nce] [--against eager,open_clip] [--device cpu] [--dtype float32] [--out DIR]`

Parity first: a variant whose outputs or gradients disagree with the float64 reference is reported, not timed. Then the variants
take turns in one process; a GPU's L2 is overwritten before each call, and what is short is timed under a CUDA graph too. Results
go to DIR (results.json and plots) and, as a table, to the terminal. A case that DIR already holds of this machine and commit is
replaced, so that a long run can be cut into several. `--base REF` compares this tree's ops with those of a commit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from . import bars, compare, peers
from .case import ALL_DTYPES, IN_PYTORCH, disagreement, name_of, run_case
from .measure import machine, machine_rates
from .plots import draw
from .store import add_rates, commit, opened, replace, save
from .table import listing, table
from .workloads import WORKLOADS

__all__ = ["DTYPES", "commit", "disagreement", "machine", "main", "save"]

DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}


def competitors() -> list[str]:
    """Every name that --against takes."""
    return list(dict.fromkeys([*IN_PYTORCH, *(name for found in peers.PEERS.values() for name in found)]))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Compare the fused ops with what else computes the same."
    )
    found.add_argument("--op", choices=sorted(WORKLOADS), action="append", help="repeatable; all without it")
    found.add_argument(
        "--against", default=",".join(competitors()), help="comma-separated; all without it: %(default)s"
    )
    found.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    found.add_argument(
        "--dtype",
        choices=list(ALL_DTYPES),
        action="append",
        help="repeatable; without it float32 on a CPU, bfloat16 and float32 on a GPU",
    )
    found.add_argument("--out", type=Path, help="folder for results.json and plots")
    found.add_argument("--fresh", action="store_true", help="drop what --out holds")
    found.add_argument("--commit", help="the commit to name, where git cannot tell")
    found.add_argument("--quick", action="store_true", help="fewer repeats, the first shape only")
    found.add_argument(
        "--bars", action="store_true", help="fail where a bar of this kind of device is missed"
    )
    found.add_argument(
        "--base", metavar="REF", help="compare our ops with those of a commit; fail when slower"
    )
    found.add_argument("--list", action="store_true", help="print ops, shapes and peers, and measure nothing")
    return found


def measure(given: argparse.Namespace, against: list[str], result: dict[str, Any]) -> None:
    """Add the cases that are asked for to the result, and keep it after each."""
    for dtype in (ALL_DTYPES[name] for name in given.dtype):
        rates = add_rates(result, name_of(dtype), machine_rates(given.device, dtype))
        for op in given.op:
            workload = WORKLOADS[op]
            shapes = workload.cases.BENCHMARK_SHAPES[given.device]
            checked: dict[str, float | str] = {}
            for shape in shapes[:1] if given.quick else shapes:
                rows = run_case(
                    op, workload, shape, dtype, given.device, against, rates, given.quick, checked
                )
                replace(result, rows)
                if given.out is not None:
                    # After every shape: a run that is cut short keeps what it measured.
                    save(result, given.out)


def main(argv: list[str] | None = None) -> int:
    arguments = parser()
    given = arguments.parse_args(argv)
    against = [name for name in given.against.split(",") if name]
    unknown = sorted(set(against) - set(competitors()))
    if unknown:
        arguments.error(f"--against: unknown {', '.join(unknown)}; one of {', '.join(competitors())}")
    if given.base is not None and given.out is not None:
        arguments.error("--base prints a comparison and keeps nothing: leave out --out")
    given.op = list(dict.fromkeys(given.op or WORKLOADS))
    given.dtype = list(dict.fromkeys(given.dtype or map(name_of, DTYPES[given.device])))
    if given.list:
        listing(given.op)
        return 0
    if given.base is not None:
        return compare.main(given.base, given.op, given.device, given.dtype, given.quick)
    libraries = {peer.library for found in peers.PEERS.values() for peer in found.values()}
    about = {**machine(given.device, libraries), "commit": given.commit or commit()}
    try:
        result = opened(given.out, about, given.fresh)
    except ValueError as other:
        arguments.error(f"--out: {other}")
    measure(given, against, result)
    rows = result["rows"]
    table(rows)
    if given.out is not None:
        draw(result, given.out)
    missed = bars.missed(rows, given.device, result["device"]) if given.bars else []
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
