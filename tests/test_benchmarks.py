"""A run of the benchmark suite: what it writes, keeps, prints and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bars, case, measure, peers, run, store
from benchmarks.measure import Rates
from benchmarks.peers import Peer
from benchmarks.table import table
from benchmarks.workloads import WORKLOADS
from jrl_kernels.ops.info_nce.cases import BENCHMARK_SHAPES, Shape


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
    assert ours["repeats"] >= 3 and ours["graph"] is False
    assert ours["flops"] == 4 * 2 * 256 * 256 * 32 and ours["bytes"] == 3 * 2 * 256 * 32 * 4
    assert ours["tflops"] == pytest.approx(ours["flops"] / ours["milliseconds"] / 1e9)
    assert rows["info_nce", "products", "forward+backward"]["milliseconds"] > 0
    for op in WORKLOADS:
        assert (tmp_path / f"{op}_float32.png").read_bytes().startswith(b"\x89PNG")
    assert "jrl cpu" in capsys.readouterr().out


def test_a_variant_that_disagrees_is_not_timed(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = WORKLOADS["info_nce"]
    monkeypatch.setitem(
        WORKLOADS, "info_nce", real._replace(peers={"eager": lambda **given: 1.01 * real.ours(**given)})
    )
    monkeypatch.setattr(run, "draw", lambda result, folder: [])
    monkeypatch.setattr(run, "machine_rates", lambda device, dtype: Rates(1e11, 1e10))
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


def test_results_of_one_commit_are_added_to(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*options: str, commit: str = "abc") -> dict[str, Any]:
        always = ("--device", "cpu", "--out", str(tmp_path), "--quick", "--commit", commit)
        assert run.main([*always, *options]) == 0
        result: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
        return result

    monkeypatch.setattr(run, "draw", lambda result, folder: [])
    monkeypatch.setattr(run, "machine_rates", lambda device, dtype: Rates(1e11, 1e10))
    measured("--op", "info_nce", "--op", "gumbel_embed", "--against", "eager")
    kept = measured("--op", "gumbel_assign", "--against", "eager")
    assert list(dict.fromkeys(row["op"] for row in kept["rows"])) == [
        "info_nce",
        "gumbel_embed",
        "gumbel_assign",
    ]
    kept["models"] = [{"model": "CLIP"}]
    kept["rates"]["torch.float32"]["flops"] = 1e18  # a better one, seen by an earlier run
    store.save(kept, tmp_path)
    again = measured("--op", "gumbel_embed", "--against", "")
    assert again["models"] == kept["models"] and again["commit"] == "abc"
    assert list(dict.fromkeys(row["op"] for row in again["rows"])) == [
        "info_nce",
        "gumbel_embed",
        "gumbel_assign",
    ]
    names = ("op", "variant", "pass", "milliseconds")
    others = [
        [[row[name] for name in names] for row in r["rows"] if row["op"] != "gumbel_embed"]
        for r in (kept, again)
    ]
    assert others[0] == others[1]
    assert {row["variant"] for row in again["rows"] if row["op"] == "gumbel_embed"} == {"jrl cpu"}
    assert again["rates"]["torch.float32"]["flops"] == 1e18
    row = again["rows"][0]
    floor = max(row["flops"] / 1e18, row["bytes"] / again["rates"]["torch.float32"]["bytes"])
    assert row["share_of_floor"] == pytest.approx(floor * 1e3 / row["milliseconds"])
    with pytest.raises(SystemExit):
        measured("--op", "gumbel_embed", commit="def")
    assert "holds results of commit abc, and this is def; --fresh drops them" in capsys.readouterr().err
    fresh = measured("--op", "gumbel_embed", "--against", "", "--fresh", commit="def")
    assert {row["op"] for row in fresh["rows"]} == {"gumbel_embed"} and "models" not in fresh


def test_results_of_another_library_are_not_mixed(tmp_path: Path) -> None:
    about = {"device": "d", "torch": "2", "libraries": {"inf_cl": "1"}}
    store.save({**about, "scaling": [1]}, tmp_path)
    with pytest.raises(ValueError, match="inf_cl 1, and this is 2"):
        store.opened(tmp_path, {**about, "libraries": {"inf_cl": "2"}})
    with pytest.raises(ValueError, match="device d, and this is e; torch 2, and this is 3"):
        store.opened(tmp_path, {**about, "device": "e", "torch": "3"})
    more = store.opened(tmp_path, {**about, "libraries": {"liger_kernel": "3"}})
    assert more["libraries"] == {"inf_cl": "1", "liger_kernel": "3"}
    assert (more["scaling"], more["rates"], more["rows"]) == ([1], {}, [])


def test_machine_names_what_a_result_depends_on() -> None:
    found = measure.machine("cpu", ("pytest", "no-such-library"))
    assert found["libraries"] == {"pytest": version("pytest")}
    assert found["triton"] == measure.version("triton") and found["device"] == found["cpu"] != ""
    assert found["threads"] == torch.get_num_threads()


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> Any:
        raise ImportError("there is no inf_cl here")

    fake = {"here": Peer("torch", lambda: print), "inf_cl": Peer("torch", missing)}
    monkeypatch.setattr(peers, "PEERS", {"info_nce": fake})
    assert run.main(["--list", "--op", "info_nce"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "info_nce" and lines[1].startswith("  cpu: 2048x2048x512 8192x8192x512 (jrl cpu)")
    assert "  in PyTorch: eager, chunked, compile" in lines and f"  here: torch {version('torch')}" in lines
    assert any(
        line.startswith("  inf_cl: not installed: ") and "there is no inf_cl here" in line for line in lines
    )


def test_what_a_table_refuses_it_gives_the_reason_of(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"op": "info_nce", "dtype": "float32", "variant": "inf_cl"}
    table([{**about, "shape": [side, side], "refused": "not installed"} for side in (8, 16)])
    assert "8x8 16x16" in (out := capsys.readouterr().out) and "not installed" in out


def test_pytest_benchmark_shows_the_same_cases(tmp_path: Path) -> None:
    """And `pytest` alone does not run them."""
    root = Path(__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-p",
        "no:cacheprovider",
        "--benchmark-only",
        "-q",
    ]
    command += ["--device", "cpu", "-k", "ranking_loss", f"--benchmark-json={tmp_path / 'b.json'}"]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {each["name"]: each for each in json.loads((tmp_path / "b.json").read_text())["benchmarks"]}
    assert set(found) == {
        f"test_op[ranking_loss-128x128x1024x0-float32-{which}-{variant}]"
        for which in case.PASSES
        for variant in ("jrl_cpu", "eager")
    }
    for each in found.values():
        assert each["stats"]["rounds"] >= 5 and each["extra_info"]["error"] < 1e-4
    assert 'testpaths = ["tests"]' in (root / "pyproject.toml").read_text()


def test_messages(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--against", "eager,jax"], "--against: unknown jax; one of eager, compile, chunked, loop"),
        (["--base", "HEAD", "--out", "x"], "--base prints a comparison and keeps nothing: leave out --out"),
    ):
        with pytest.raises(SystemExit):
            run.main(arguments)
        assert message in capsys.readouterr().err
