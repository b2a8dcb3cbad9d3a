"""One case of the benchmark suite: who takes part, parity, refusals, rounds, graphs; and the memory bar, which unlike time does
not depend on neighbours."""

from __future__ import annotations

import platform
from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import case, measure, peers
from benchmarks.bars import BARS, Bar
from benchmarks.case import Variant, disagreement, run_case, step
from benchmarks.measure import Rates, extra_memory, interleave
from benchmarks.peers import Peer
from benchmarks.workloads import WORKLOADS
from jrl_kernels.ops.info_nce.cases import Shape


def info_nce_case(against: tuple[str, ...] = (), **options: Any) -> list[dict[str, Any]]:
    shape = Shape(64, 64, 16)
    rates = Rates(1e11, 1e10)
    return run_case(
        "info_nce", WORKLOADS["info_nce"], shape, torch.float32, "cpu", against, rates, True, **options
    )


def by_variant(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    found = {}
    for row in rows:
        where = [row["pass"]] if "pass" in row else []
        key = (row["variant"], *where, *(["graph"] if row.get("graph") else []))
        found[key] = row
    assert len(found) == len(rows)
    return found


def test_interleaving_takes_turns() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = interleave(steps, "cpu", repeats=2, warmup=1)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert timings["a"].repeats == 2 and timings["a"].low <= timings["a"].median <= timings["a"].high


def test_rounds_fill_about_a_second() -> None:
    assert [measure.rounds(once) for once in (0.5, 0.1, 1e-9)] == [5, 10, 200]
    assert measure.rounds(0.5, seconds=0.2, least=3) == 3
    timings = interleave({"a": lambda: None}, "cpu", seconds=1e-9, least=4)
    assert timings["a"].repeats == 4


def test_a_step_that_fails_leaves_the_others() -> None:
    calls = {"late": 0}

    def late() -> None:
        calls["late"] += 1
        if calls["late"] == 3:
            raise RuntimeError("the third call\nand more of it")

    def memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    steps = {"late": late, "memory": memory, "good": lambda: None}
    failures: dict[str, str] = {}
    timings = interleave(steps, "cpu", repeats=4, failures=failures)
    assert set(timings) == {"good"} and timings["good"].repeats == 4
    assert failures == {
        "late": "RuntimeError: the third call",
        "memory": "out of memory: CUDA out of memory. Tried to allocate 2 GiB",
    }
    with pytest.raises(torch.OutOfMemoryError):
        interleave(steps, "cpu", repeats=1)


def test_peers_take_part_or_are_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = WORKLOADS["info_nce"].peers["eager"]

    def missing() -> Any:
        raise ImportError("No module named 'inf_cl'")

    def refuses(x: Tensor, **given: Any) -> Tensor:
        if x.shape[0] == 64:
            raise NotImplementedError("rows: a multiple of 128, got 64")
        return eager(x=x, **given)

    def out_of_memory(x: Tensor, **given: Any) -> Tensor:
        if x.shape[0] == 64 and x.requires_grad:
            raise torch.OutOfMemoryError("tried to allocate 17 GiB")
        return eager(x=x, **given)

    def only_forward(**given: Any) -> Tensor:
        return eager(**given).detach()

    fake = {
        "good": Peer("torch", lambda: eager, why="no bias"),
        "missing": Peer("inf_cl", missing),
        "gpu": Peer("torch", lambda: eager, devices=("cuda",)),
        "half": Peer("torch", lambda: eager, dtypes=(torch.bfloat16, torch.float16)),
        "refuses": Peer("torch", lambda: refuses),
        "out_of_memory": Peer("torch", lambda: out_of_memory),
        "wrong": Peer("torch", lambda: lambda **given: -eager(**given)),
        "shape": Peer("torch", lambda: lambda **given: eager(**given)[None]),
        "only_forward": Peer("torch", lambda: only_forward, passes=("forward",)),
        "not_asked_for": Peer("torch", lambda: eager),
    }
    monkeypatch.setattr(peers, "PEERS", {"info_nce": fake})
    rows = by_variant(info_nce_case(tuple(fake)[:-1]))
    good = rows["good", "forward+backward"]
    assert (good["library"], good["version"], good["why"]) == ("torch", version("torch"), "no bias")
    assert good["milliseconds"] > 0 and good["error"] < 1e-5
    reasons = {where: row["refused"] for where, row in rows.items() if "refused" in row}
    assert "inf_cl" in reasons.pop(("missing",))
    assert reasons == {
        ("gpu",): "runs on cuda alone",
        ("half",): "takes bfloat16, float16 alone",
        ("refuses", "forward"): "rows: a multiple of 128, got 64",
        ("refuses", "forward+backward"): "rows: a multiple of 128, got 64",
        ("out_of_memory", "forward+backward"): "out of memory: tried to allocate 17 GiB",
        ("wrong",): "disagrees with float64 by 2",
        ("shape",): reasons["shape",],
        ("only_forward", "forward+backward"): "has no forward+backward",
    }
    assert reasons["shape",].startswith("ValueError: outputs and gradients: expected shapes [], [384, 64]")
    assert rows["only_forward", "forward"]["milliseconds"] > 0
    assert rows["out_of_memory", "forward"]["milliseconds"] > 0
    assert rows["jrl cpu", "forward"]["milliseconds"] > 0
    assert not any(where[0] == "not_asked_for" for where in rows)


def test_a_peer_of_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    hopper = Peer("torch", lambda: print, capability=(9, 0))
    assert case.declines(hopper, "cuda", torch.bfloat16) == "needs compute capability 9.x, and this is 8.6"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 1))
    assert case.declines(hopper, "cuda", torch.bfloat16) == ""


def test_a_wrong_gradient_of_one_argument_does_not_pass() -> None:
    workload = WORKLOADS["info_nce"]

    def wrong(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return workload.peers["eager"](x, y, scale.detach() + 0.5 * (scale - scale.detach()))

    assert disagreement(wrong, workload, "cpu", torch.float32) == pytest.approx(0.5, rel=1e-3)
    assert disagreement(wrong, workload, "cpu", torch.float32, backward=False) < 1e-5


def test_parity_compares_gradients_of_unequal_inflow() -> None:
    """The gradient of a sum is right here, that of each output is not."""
    workload = WORKLOADS["max_sim"]

    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, scores: Tensor) -> Tensor:
            return scores.clone()

        @staticmethod
        def backward(_: Any, *inflow: Tensor) -> Tensor:
            return inflow[0].mean().expand_as(inflow[0])

    def mixed(**given: Any) -> Tensor:
        return Mixed.apply(workload.peers["eager"](**given))

    assert disagreement(mixed, workload, "cpu", torch.float32) > 0.05


def test_a_variant_that_refuses_the_small_shape_is_checked_on_a_timed_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload = WORKLOADS["info_nce"]
    monkeypatch.setitem(workload.cases.BENCHMARK_SHAPES, "cpu", [Shape(64, 64, 16)])

    def multiple(factor: float, smallest: int) -> Variant:
        def function(x: Tensor, **given: Any) -> Tensor:
            if x.shape[0] == workload.parity.rows or x.shape[0] < smallest:
                raise NotImplementedError(f"rows: got {x.shape[0]}")
            return factor * workload.peers["eager"](x=x, **given)

        return Variant("multiple", function)

    error = case.check_parity(multiple(1.0, 0), workload, "cpu", torch.float32)
    assert isinstance(error, float) and error < 1e-5
    assert (
        case.check_parity(multiple(2.0, 0), workload, "cpu", torch.float32) == "disagrees with float64 by 1"
    )
    assert case.check_parity(multiple(1.0, 65), workload, "cpu", torch.float32) == "rows: got 384"


def test_a_nan_does_not_pass() -> None:
    nan = torch.tensor([float("nan")])
    error = case.apart([torch.ones(1), nan, torch.ones(1)], [torch.ones(1)] * 3)
    assert error != error
    workload = WORKLOADS["info_nce"]
    spoiled = Variant("spoiled", lambda **given: workload.ours(**given) * float("nan"))
    assert case.check_parity(spoiled, workload, "cpu", torch.float32) == "disagrees with float64 by nan"


def test_inputs_that_do_not_fit_refuse_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(shape: Shape, **options: Any) -> Any:
        raise torch.OutOfMemoryError("8 GiB")

    monkeypatch.setitem(WORKLOADS, "info_nce", WORKLOADS["info_nce"]._replace(make_inputs=too_large))
    rows = by_variant(info_nce_case(("eager",)))
    assert {row["refused"] for row in rows.values()} == {"its inputs: out of memory: 8 GiB"}
    assert set(rows) == {("jrl cpu",), ("eager",)}


def test_what_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compiler(function: Any, *, mode: str, dynamic: bool) -> Any:
        modes.append((mode, dynamic))

        def fails(**given: Any) -> Any:
            raise RuntimeError("no kernel was found")

        return fails

    monkeypatch.setattr(torch, "compile", compiler)
    rows = by_variant(info_nce_case(("compile",)))
    assert rows["compile",]["refused"] == "RuntimeError: no kernel was found"
    case.variants("info_nce", WORKLOADS["info_nce"], "cuda", torch.float32, ("compile",))
    assert modes == [("default", False), ("max-autotune", False)]


def test_parity_is_shared_by_the_shapes_of_an_op() -> None:
    checked: dict[str, float | str] = {"eager": "said before"}
    rows = by_variant(info_nce_case(("eager",), checked=checked))
    assert rows["eager",]["refused"] == "said before"
    assert checked["jrl cpu"] == rows["jrl cpu", "forward"]["error"]


def test_small_steps_are_timed_under_a_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(eager: Any) -> Any:
        """Stands in for a CUDA graph: outputs that each replay overwrites."""
        outputs = [output.detach().clone() for output in measure.tensors(eager())]

        def replay() -> None:
            for output, now in zip(outputs, measure.tensors(eager()), strict=True):
                output.copy_(now)

        return replay, outputs

    monkeypatch.setattr(measure, "capture", capture)
    assert not any(row["graph"] for row in info_nce_case())
    monkeypatch.setattr(case, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(case, "GRAPH_BELOW", 1e9)
    graph = by_variant(info_nce_case())["jrl cpu", "forward+backward", "graph"]
    assert graph["milliseconds"] > 0 and graph["extra_bytes"] is None and graph["graph"] is True

    monkeypatch.setattr(measure, "capture", lambda eager: (lambda: None, capture(eager)[1]))
    graph = by_variant(info_nce_case())["jrl cpu", "forward", "graph"]
    assert graph["refused"] == "RuntimeError: under a CUDA graph it differs from itself by nan"

    def fails(eager: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure, "capture", fails)
    rows = by_variant(info_nce_case())
    refused = rows["jrl cpu", "forward+backward", "graph"]["refused"]
    assert refused == "RuntimeError: operation not permitted when stream is capturing"
    assert rows["jrl cpu", "forward+backward"]["milliseconds"] > 0
    monkeypatch.setattr(case, "GRAPH_BELOW", 0.0)
    assert not any(row["graph"] for row in info_nce_case())


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Every variant in PyTorch and ours, eager and under a CUDA graph, with the allocator's memory."""
    op, shape = "info_nce", Shape(512, 512, 64)
    rows = run_case(
        op, WORKLOADS[op], shape, torch.bfloat16, "cuda", ("eager", "chunked"), Rates(1e14, 1e12), True
    )
    found = by_variant(rows)
    for variant in ("jrl triton", "eager"):
        for which in case.PASSES:
            assert found[variant, which]["milliseconds"] > 0 and found[variant, which]["error"] < 3e-2
            assert found[variant, which, "graph"]["milliseconds"] > 0
    assert found["eager", "forward+backward"]["extra_bytes"] >= 512 * 512 * 2
    assert case.graph_of(lambda: torch.ones(3, device="cuda") + 1, torch.float32)() is None
    with pytest.raises(RuntimeError):
        case.graph_of(lambda: torch.ones(3, device="cuda").sum().item(), torch.float32)


@pytest.mark.skipif(platform.system() != "Linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "bar", [bar for bar in BARS if bar.measure == "extra_bytes" and bar.against], ids=str
)
def test_memory_bar(bar: Bar) -> None:
    """Unlike time, memory does not depend on what else the machine does, so a test can hold its bars."""
    workload = WORKLOADS[bar.op]
    shapes = workload.cases.BENCHMARK_SHAPES["cpu"]
    (shape,) = (shape for shape in shapes if list(shape) == bar.shape)
    arguments = workload.make_inputs(shape, dtype=torch.float32, device="cpu")
    assert bar.when == "forward+backward" and bar.against is not None
    ours, other = (
        extra_memory(step(function, arguments, backward=True), "cpu")
        for function in (partial(workload.ours, backend="cpu"), workload.peers[bar.against])
    )
    assert ours is not None and other is not None
    assert ours <= bar.limit * other


@pytest.mark.parametrize(
    ("name", "peer"), [(name, peer) for name, workload in WORKLOADS.items() for peer in workload.peers]
)
def test_peers_compute_the_same(name: str, peer: str) -> None:
    workload = WORKLOADS[name]
    assert disagreement(workload.peers[peer], workload, "cpu", torch.float32) < 1e-5
