"""The benchmark suite: what it refuses, what it writes, and the memory bar, which unlike time does not depend on neighbours."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from benchmarks import bars, run
from benchmarks.measure import extra_memory, interleave
from benchmarks.run import disagreement
from benchmarks.workloads import WORKLOADS
from jrl_kernels.ops.info_nce.cases import BENCHMARK_SHAPES, Shape, make_inputs


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for workload in WORKLOADS.values():
        monkeypatch.setitem(workload.cases.BENCHMARK_SHAPES, "cpu", [workload.parity])
    monkeypatch.setitem(BENCHMARK_SHAPES, "cpu", [Shape(256, 256, 32)])


def test_writes_what_it_measured(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--against", "eager,chunked", "--out", str(tmp_path), "--quick"]
    assert run.main(options) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["torch"] == torch.__version__ and result["rates"]["torch.float32"]["flops"] > 0
    rows = {(row["op"], row["variant"], row["pass"]): row for row in result["rows"]}
    assert {op for op, _, _ in rows} == set(WORKLOADS)
    ours = rows["info_nce", "jrl cpu", "forward+backward"]
    assert 0 < ours["low"] <= ours["milliseconds"] <= ours["high"]
    assert ours["error"] < 1e-5 and ours["shape"] == [256, 256, 32]
    assert rows["info_nce", "products", "forward+backward"]["milliseconds"] > 0
    for op in WORKLOADS:
        assert (tmp_path / f"{op}_float32.png").read_bytes().startswith(b"\x89PNG")
    assert "jrl cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "peer"), [(name, peer) for name, workload in WORKLOADS.items() for peer in workload.peers]
)
def test_peers_compute_the_same(name: str, peer: str) -> None:
    workload = WORKLOADS[name]
    assert disagreement(workload.peers[peer], workload, "cpu", torch.float32) < 1e-5


def test_a_variant_that_disagrees_is_not_timed(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = WORKLOADS["info_nce"]
    monkeypatch.setitem(
        WORKLOADS, "info_nce", real._replace(peers={"eager": lambda **given: 1.01 * real.ours(**given)})
    )
    run.main(["--device", "cpu", "--op", "info_nce", "--against", "eager", "--out", str(tmp_path), "--quick"])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    (refused,) = [row for row in rows if row["variant"] == "eager"]
    assert refused["refused"].startswith("disagrees with float64 by 0.01")


def test_bars_are_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def row(variant: str, milliseconds: float, extra: int) -> dict[str, object]:
        about = {"op": "info_nce", "shape": [8, 8, 2], "pass": "forward", "variant": variant}
        return {**about, "milliseconds": milliseconds, "extra_bytes": extra}

    case = "info_nce", [8, 8, 2], "forward"
    against_eager = bars.Bar(*case, "milliseconds", "eager", 0.45)
    own_memory = bars.Bar(*case, "extra_bytes", None, 1000)
    monkeypatch.setattr(bars, "BARS", (against_eager, own_memory))
    eager = row("eager", 100.0, 1600)
    assert bars.missed([row("jrl cpu", 45.0, 1000), eager]) == []
    assert "info_nce 8x8x2 forward: time against eager 0.45 (bar 0.45)" in capsys.readouterr().out
    assert bars.missed([row("jrl cpu", 60.0, 1001), eager]) == [
        "info_nce 8x8x2 forward: time against eager 0.6 is above 0.45",
        "info_nce 8x8x2 forward: extra memory 1001 is above 1000",
    ]
    assert bars.missed([row("jrl cpu", 60.0, 1000)]) == [
        "info_nce 8x8x2 forward: time against eager: not measured"
    ]


def test_bars_are_of_shapes_that_are_measured() -> None:
    for bar in bars.BARS:
        assert bar.shape in [list(shape) for shape in WORKLOADS[bar.op].cases.BENCHMARK_SHAPES["cpu"]]
        assert bar.against is None or bar.against == "products" or bar.against in WORKLOADS[bar.op].peers


@pytest.mark.skipif(platform.system() != "Linux", reason="peak memory is read from /proc")
def test_memory_bar() -> None:
    """At 8192 x 512, forward and backward, the extra memory is at most a sixteenth of eager PyTorch's."""
    workload = WORKLOADS["info_nce"]
    arguments = make_inputs(Shape(8192, 8192, 512), scale=14.0)
    found = {
        name: extra_memory(run._steps(loss, arguments, backward=True), "cpu")
        for name, loss in (("ours", workload.ours), ("eager", workload.peers["eager"]))
    }
    assert found["ours"] is not None and found["eager"] is not None
    assert found["eager"] > 8192 * 8192 * 4
    assert found["ours"] <= found["eager"] / 16


def test_interleaving_takes_turns() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = interleave(steps, "cpu", repeats=2, warmup=1)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert timings["a"].repeats == 2 and timings["a"].low <= timings["a"].median <= timings["a"].high


def test_messages(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--against", "eager,jax"], "--against: unknown jax; one of eager, compile, chunked, loop"),
        (["--bars", "--device", "cuda"], "--bars holds CPU bars"),
    ):
        with pytest.raises(SystemExit):
            run.main(arguments)
        assert message in capsys.readouterr().err
