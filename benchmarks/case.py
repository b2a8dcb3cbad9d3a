"""One op at one shape and dtype: who takes part, whether they are right, how long they take and what they allocate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import measure, peers
from .measure import Rates, Step, tensors
from .store import share_of_floor
from .workloads import Workload
from .workloads.workload import Function

Rows = list[dict[str, Any]]
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
IN_PYTORCH = ("eager", "compile", "chunked", "loop")
PASSES = ("forward", "forward+backward")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# Above it the launches that a CUDA graph saves are lost in the spread.
GRAPH_BELOW = 5e-3  # seconds
GRAPH_DEVICES = ("cuda",)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


ALL_DTYPES = {name_of(dtype): dtype for dtype in TOLERANCE}


class Variant(NamedTuple):
    name: str
    function: Function
    passes: tuple[str, ...] = PASSES
    about: dict[str, str] = {}  # noqa: RUF012 (never written to)


def variants(
    op: str, workload: Workload, device: str, dtype: torch.dtype, against: Collection[str]
) -> tuple[list[Variant], dict[str, str]]:
    """Those that take part, and by name why others that were asked for do not."""
    found = [
        Variant(f"jrl {name}", partial(workload.ours, backend=name))
        for name in BACKENDS[device]
        if name in workload.backends
    ]
    found += [Variant(name, function) for name, function in workload.peers.items() if name in against]
    refused = {}
    if "compile" in against and "eager" in workload.peers:
        mode = "max-autotune" if device == "cuda" else "default"
        try:
            # Compiled for each shape: a kernel for any shape would not be its best.
            compiled = torch.compile(workload.peers["eager"], mode=mode, dynamic=False)
            found.append(Variant("compile", compiled))
        except Exception as error:
            refused["compile"] = measure.reason(error)
    for name, peer in peers.PEERS.get(op, {}).items():
        if name in against:
            function, version_or_reason = peers.installed(peer)
            declined = version_or_reason if function is None else declines(peer, device, dtype)
            if function is None or declined:
                refused[name] = declined
            else:
                about = {"library": peer.library, "version": version_or_reason, "why": peer.why}
                found.append(
                    Variant(name, function, peer.passes, {k: text for k, text in about.items() if text})
                )
    return found, refused


def declines(peer: peers.Peer, device: str, dtype: torch.dtype) -> str:
    """Why the peer cannot serve this device or dtype; empty where it can."""
    if device not in peer.devices:
        return f"runs on {' and '.join(peer.devices)} alone"
    if peer.dtypes is not None and dtype not in peer.dtypes:
        return f"takes {', '.join(name_of(each) for each in peer.dtypes)} alone"
    if device == "cuda" and peer.capability is not None:
        major, minor = torch.cuda.get_device_capability()
        if major != peer.capability[0]:
            return f"needs compute capability {peer.capability[0]}.x, and this is {major}.{minor}"
    return ""


def _leaves(arguments: dict[str, Any]) -> list[Tensor]:
    return [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]


def _differentiable(result: Any) -> list[Tensor]:
    return [output for output in tensors(result) if output.is_floating_point()]


def _uneven(output: Tensor) -> Tensor:
    """A gradient of its own for every element, so that one that is right for equal ones alone does not pass."""
    # In steps that bfloat16 holds exactly: float64 and every dtype are given the same.
    weight = (torch.linspace(0.5, 1.5, output.numel(), device=output.device) * 64).round() / 64
    return weight.view(output.shape).to(output.dtype)


def gradients(result: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
    outputs = _differentiable(result)
    return list(torch.autograd.grad(outputs, leaves, [_uneven(output) for output in outputs]))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def apart(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest difference, relative to each one's size."""
    if [tuple(f.shape) for f in found] != [tuple(t.shape) for t in truth]:
        shapes = (", ".join(str(list(t.shape)) for t in side) for side in (truth, found))
        raise ValueError("outputs and gradients: expected shapes {}, got {}".format(*shapes))
    errors = [
        float((f.detach().double() - t.detach()).norm() / t.detach().double().norm().clamp(min=1e-12))
        for f, t in zip(found, truth, strict=True)
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


def disagreement(
    function: Function,
    workload: Workload,
    device: str,
    dtype: torch.dtype,
    backward: bool | None = None,
    shape: Any = None,
) -> float:
    """Largest error of outputs and gradients against float64, relative to each one's size, on a small problem.

    Args:
        function: takes what the workload's `make_inputs` returns, as keywords.
        workload: the op.
        device: "cpu" or "cuda".
        dtype: of the inputs.
        backward: whether gradients are compared; None as the workload has them.
        shape: of the problem; None for the workload's own.
    """
    shape = workload.parity if shape is None else shape
    arguments = workload.make_inputs(shape, dtype=dtype, device=device)
    exact = {name: _double(value) for name, value in arguments.items()}

    def numbers(result: Any, given: dict[str, Any]) -> list[Tensor]:
        leaves = _leaves(given) if (workload.backward if backward is None else backward) else []
        return tensors(result) + (gradients(result, leaves) if leaves else [])

    truth = numbers(workload.ours(**exact, backend="reference"), exact)
    return apart(numbers(function(**arguments), arguments), truth)


class Backward:
    """Forward and gradients of every leaf. What flows in is made once: only the function is timed."""

    def __init__(self, function: Function, arguments: dict[str, Any]) -> None:
        self.function, self.arguments, self.leaves = function, arguments, _leaves(arguments)
        self.inflow: list[Tensor] | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        outputs = _differentiable(self.function(**self.arguments))
        if self.inflow is None:
            # A loss starts from one, as loss.backward() does.
            self.inflow = [_uneven(o) if o.ndim else torch.ones_like(o) for o in outputs]
        return torch.autograd.grad(outputs, self.leaves, self.inflow)


def step(function: Function, arguments: dict[str, Any], backward: bool) -> Step:
    """The call that is timed."""
    if backward:
        return Backward(function, arguments)
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return lambda: function(**detached)


def check_parity(variant: Variant, workload: Workload, device: str, dtype: torch.dtype) -> float | str:
    """The error against float64, or why the variant is not timed.

    A variant that refuses the small shape is checked on the first that is timed: some have kernels for certain sizes alone.
    """
    backward = workload.backward and PASSES[1] in variant.passes
    refusal = ""
    for shape in (workload.parity, workload.cases.BENCHMARK_SHAPES[device][0]):
        try:
            error = disagreement(variant.function, workload, device, dtype, backward, shape)
        except Exception as raised:
            refusal = refusal or measure.reason(raised)
            if not isinstance(raised, NotImplementedError):
                break
        else:
            return error if error <= TOLERANCE[dtype] else f"disagrees with float64 by {error:.2g}"
    measure.release(device)
    return refusal


def graph_of(eager: Step, dtype: torch.dtype) -> Step:
    """The step as a CUDA graph, which gives what the step gives; RuntimeError where it does not."""
    expected = [output.detach().double() for output in tensors(eager())]
    replay, outputs = measure.capture(eager)
    with torch.no_grad():
        for output in outputs:
            output.fill_(float("nan") if output.is_floating_point() else -1)
    replay()
    error = apart(outputs, expected)
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"under a CUDA graph it differs from itself by {error:.2g}")
    return replay


class _Pass:
    """One pass of a case: steps by variant, their rows and refusals."""

    def __init__(
        self,
        about: dict[str, Any],
        workload: Workload,
        shape: Any,
        dtype: torch.dtype,
        device: str,
        which: str,
    ) -> None:
        self.about, self.dtype, self.device, self.which = about, dtype, device, which
        backward = which == PASSES[1]
        self.flops = workload.cases.flops(shape, backward)
        self.bytes = workload.cases.bytes_moved(shape, dtype, backward)
        self.steps: dict[str, Step] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self.rows: Rows = []

    def refuse(self, variant: str, why: str, graph: bool = False) -> None:
        self.rows.append(
            {**self.about, "variant": variant, "pass": self.which, "graph": graph, "refused": why}
        )

    def add(self, name: str, call: Step, notes: dict[str, Any]) -> None:
        """Measures the memory as well, which is the first that shows whether the shape fits."""
        try:
            memory = measure.extra_memory(call, self.device)
        except Exception as error:
            self.refuse(name, measure.reason(error))
        else:
            self.steps[name], self.notes[name] = call, {**notes, "extra_bytes": memory}
            return
        measure.release(self.device)

    def time(self, rates: Rates, quick: bool) -> Rows:
        """Eager rows of all, and rows under a CUDA graph of what is small enough for launches to matter."""
        timings = self._time(self.steps, rates, quick, graph=False)
        if self.device in GRAPH_DEVICES:
            graphs: dict[str, Step] = {}
            for name, timing in timings.items():
                if timing.median >= GRAPH_BELOW:
                    continue
                if name == "compile":
                    self.refuse(
                        name, "max-autotune captures a graph of its own: see its other row", graph=True
                    )
                    continue
                try:
                    graphs[name] = graph_of(self.steps[name], self.dtype)
                except Exception as error:
                    self.refuse(name, measure.reason(error), graph=True)
            self._time(graphs, rates, quick, graph=True)
        return self.rows

    def _time(
        self, steps: dict[str, Step], rates: Rates, quick: bool, graph: bool
    ) -> dict[str, measure.Timing]:
        failures: dict[str, str] = {}
        seconds, least = (0.1, 3) if quick else (1.0, 5)
        timings = measure.interleave(steps, self.device, seconds=seconds, least=least, failures=failures)
        for name, why in failures.items():
            self.refuse(name, why, graph)
        for name, timing in timings.items():
            figures = {
                "milliseconds": timing.median * 1e3,
                "low": timing.low * 1e3,
                "high": timing.high * 1e3,
                "repeats": timing.repeats,
                "flops": self.flops,
                "bytes": self.bytes,
                "tflops": self.flops / timing.median / 1e12,
            }
            row = {**self.about, "variant": name, "pass": self.which, "graph": graph, **figures}
            row["share_of_floor"] = share_of_floor(row, rates)
            notes = {"extra_bytes": None, "error": None, **self.notes[name]}
            if graph:
                notes["extra_bytes"] = None  # its memory is the graph's, taken once and for all
            self.rows.append({**row, **notes})
        return timings


def run_case(
    op: str,
    workload: Workload,
    shape: Any,
    dtype: torch.dtype,
    device: str,
    against: Collection[str],
    rates: Rates,
    quick: bool,
    checked: dict[str, float | str] | None = None,
) -> Rows:
    """The rows of one op at one shape and dtype. Whatever a variant raises becomes its refusal.

    Args:
        op: its name in WORKLOADS.
        workload: what WORKLOADS holds.
        shape: one of the op's.
        dtype: of the inputs: casts to it are done before anything is timed.
        device: "cpu" or "cuda".
        against: names of peers.
        rates: what sets the floor.
        quick: fewer repeats.
        checked: parity by variant; filled here, so that the shapes of an op and dtype share it.
    """
    checked = {} if checked is None else checked
    if "compile" in against:
        torch.compiler.reset()  # or the shapes of all cases would count against one limit of recompilations
    about = {"op": op, "shape": list(shape), "dtype": name_of(dtype)}
    found, refused = variants(op, workload, device, dtype, against)
    try:
        arguments = workload.make_inputs(shape, dtype=dtype, device=device)
    except Exception as error:
        refused |= {variant.name: f"its inputs: {measure.reason(error)}" for variant in found}
        found = []
    right: list[tuple[Variant, float]] = []
    for variant in found:
        if variant.name not in checked:
            checked[variant.name] = check_parity(variant, workload, device, dtype)
        outcome = checked[variant.name]
        if isinstance(outcome, str):
            refused[variant.name] = outcome
        else:
            right.append((variant, outcome))
    rows: Rows = [{**about, "variant": name, "refused": why} for name, why in refused.items()]
    if not right:
        return rows
    for which in PASSES if workload.backward else PASSES[:1]:
        backward = which == PASSES[1]
        measured = _Pass(about, workload, shape, dtype, device, which)
        for variant, distance in right:
            if which not in variant.passes:
                measured.refuse(variant.name, f"has no {which}")
            else:
                call = step(variant.function, arguments, backward)
                measured.add(variant.name, call, {"error": distance, **variant.about})
        if workload.products is not None:
            measured.add("products", workload.products(arguments, backward), {})
        rows += measured.time(rates, quick)
    return rows
