"""`python -m benchmarks.run [--op info_nce] [--against eager,compile,chunked,loop] [--device cpu] [--out DIR]`

Parity first: a variant whose loss or gradients disagree with the float64 reference is reported, not timed. Then the variants
take turns in one process. Results go to DIR (results.json and plots) and, as a table, to the terminal; `--bars` checks the CPU
bars too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bars
from .measure import Rates, Step, extra_memory, interleave, machine, machine_rates
from .plots import draw
from .workloads import WORKLOADS, Workload
from .workloads.workload import Function

AGAINST = ("eager", "compile", "chunked", "loop")
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def variants(workload: Workload, device: str, against: list[str]) -> dict[str, Function]:
    ours = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[device]
    found: dict[str, Function] = {
        f"jrl {name}": partial(workload.ours, backend=name) for name in ours if name in workload.backends
    }
    found |= {name: peer for name, peer in workload.peers.items() if name in against}
    if "compile" in against and "eager" in workload.peers:
        mode = "max-autotune" if device == "cuda" else "default"
        found["compile"] = torch.compile(workload.peers["eager"], mode=mode)
    return found


def _leaves(arguments: dict[str, Any]) -> list[Tensor]:
    return [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]


def _outputs(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]


def _weighed(result: Any) -> Tensor:
    """The scalar that is differentiated."""
    total = None
    for output in _outputs(result):
        if output.is_floating_point():
            weight = torch.linspace(0.5, 1.5, output.numel(), device=output.device).view(output.shape)
            term = (output * weight.to(output.dtype)).sum()
            total = term if total is None else total + term
    assert total is not None
    return total


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def disagreement(function: Function, workload: Workload, device: str, dtype: torch.dtype) -> float:
    """Largest error of outputs and gradients against float64, relative to each one's size, on a small problem."""
    arguments = workload.make_inputs(workload.parity, dtype=dtype, device=device)
    exact = {name: _double(value) for name, value in arguments.items()}

    def numbers(result: Any, given: dict[str, Any]) -> list[Tensor]:
        leaves = _leaves(given) if workload.backward else []
        return _outputs(result) + (list(torch.autograd.grad(_weighed(result), leaves)) if leaves else [])

    truth = numbers(workload.ours(**exact, backend="reference"), exact)
    found = numbers(function(**arguments), arguments)
    return max(
        float((f.detach().double() - t.detach()).norm() / t.detach().double().norm().clamp(min=1e-12))
        for f, t in zip(found, truth, strict=True)
    )


def _steps(function: Function, arguments: dict[str, Any], backward: bool) -> Step:
    if backward:
        leaves = _leaves(arguments)
        return lambda: torch.autograd.grad(_weighed(function(**arguments)), leaves)
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return lambda: function(**detached)


def run_case(
    name: str,
    workload: Workload,
    shape: Any,
    dtype: torch.dtype,
    device: str,
    against: list[str],
    rates: Rates,
    quick: bool,
) -> list[dict[str, Any]]:
    arguments = workload.make_inputs(shape, dtype=dtype, device=device)
    about = {"op": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    functions: dict[str, tuple[Function, dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for variant, function in variants(workload, device, against).items():
        case = {**about, "variant": variant}
        try:
            error = disagreement(function, workload, device, dtype)
            if not error <= TOLERANCE[dtype]:
                rows.append({**case, "refused": f"disagrees with float64 by {error:.2g}"})
                continue
            memory = extra_memory(_steps(function, arguments, workload.backward), device)
        except (torch.cuda.OutOfMemoryError, NotImplementedError) as reason:
            rows.append({**case, "refused": str(reason).splitlines()[0]})
            continue
        functions[variant] = (function, {**case, "error": error, "extra_bytes": memory})
    for backward in (False, True) if workload.backward else (False,):
        steps = {
            variant: _steps(function, arguments, backward) for variant, (function, _) in functions.items()
        }
        if workload.products is not None:
            steps["products"] = workload.products(arguments, backward)
        timings = interleave(steps, device, repeats=3 if quick else 7, warmup=1)
        flops = workload.cases.flops(shape, backward)
        floor = max(flops / rates.flops, workload.cases.bytes_moved(shape, dtype, backward) / rates.bytes)
        for variant, timing in timings.items():
            case = functions[variant][1] if variant in functions else {**about, "variant": variant}
            rows.append(
                {
                    **case,
                    "pass": "forward+backward" if backward else "forward",
                    "milliseconds": timing.median * 1e3,
                    "low": timing.low * 1e3,
                    "high": timing.high * 1e3,
                    "tflops": flops / timing.median / 1e12,
                    "share_of_floor": floor / timing.median,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table(title="benchmarks", show_lines=False)
    for column in (
        "op",
        "shape",
        "dtype",
        "variant",
        "pass",
        "ms",
        "spread",
        "TFLOP/s",
        "of floor",
        "extra MiB",
        "error",
    ):
        out.add_column(column, justify="left" if column in ("op", "variant", "pass", "dtype") else "right")
    for row in rows:
        start = (row["op"], "x".join(map(str, row["shape"])), row["dtype"], row["variant"])
        if "refused" in row:
            out.add_row(*start, row["refused"])
            continue
        memory, error = row.get("extra_bytes"), row.get("error")
        out.add_row(
            *start,
            row["pass"],
            f"{row['milliseconds']:.2f}",
            f"{row['low']:.2f}-{row['high']:.2f}",
            f"{row['tflops']:.3g}",
            f"{row['share_of_floor']:.0%}",
            "" if memory is None else f"{memory / 2**20:.0f}",
            "" if error is None else f"{error:.1e}",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(out)


def commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def save(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Compare the fused ops with PyTorch's."
    )
    parser.add_argument(
        "--op", choices=sorted(WORKLOADS), action="append", help="one op (repeatable); all without it"
    )
    parser.add_argument(
        "--against", default=",".join(AGAINST), help=f"comma-separated, of {', '.join(AGAINST)}"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, help="folder for results.json and plots")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, the first shape only")
    parser.add_argument("--bars", action="store_true", help="fail where a CPU bar is missed")
    given = parser.parse_args(argv)
    against = [name for name in given.against.split(",") if name]
    unknown = sorted(set(against) - set(AGAINST))
    if unknown:
        parser.error(f"--against: unknown {', '.join(unknown)}; one of {', '.join(AGAINST)}")
    if given.bars and given.device != "cpu":
        parser.error("--bars holds CPU bars; add --device cpu")
    rows: list[dict[str, Any]] = []
    rates = {}
    for dtype in DTYPES[given.device]:
        rate = machine_rates(given.device, dtype)
        rates[str(dtype)] = rate._asdict()
        for name in given.op or WORKLOADS:
            workload = WORKLOADS[name]
            shapes = workload.cases.BENCHMARK_SHAPES[given.device]
            for shape in shapes[:1] if given.quick else shapes:
                rows += run_case(name, workload, shape, dtype, given.device, against, rate, given.quick)
                if given.out is not None:
                    # After every shape: a run that is cut short keeps what it measured.
                    result = {**machine(given.device), "commit": commit(), "rates": rates, "rows": rows}
                    save(result, given.out)
    table(rows)
    if given.out is not None:
        draw(result, given.out)
    missed = bars.missed(rows) if given.bars else []
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
