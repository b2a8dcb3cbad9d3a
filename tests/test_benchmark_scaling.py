"""Fitted exponents: the fit itself, the grids, what becomes of a variant that fails, and memory that does not depend on time."""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scaling
from benchmarks.measure import machine
from benchmarks.scaling import GRIDS, Grid, exponent
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "info_nce": Grid(
        {"rows": 64, "columns": 64, "width": 16},
        scaling.MATRIX,
        {"B": (32, 64, 128), "D": (8, 16, 32)},
        scaling.SCORES_GO,
    ),
    "word_region_scores": Grid(
        {"images": 4, "captions": 4, "words": 4, "regions": 8, "width": 8},
        scaling.PAIRS,
        {"T": (2, 4, 8), "R": (4, 8, 16)},
        scaling.SCORES_STAY,
    ),
    "retrieval_ranks": Grid(
        {"rows": 64, "columns": 64, "width": 16}, scaling.MATRIX, {"B": (64, 128)}, scaling.SCORES_GO
    ),
}


def test_the_exponent_of_a_power_law() -> None:
    sizes = [3, 7, 20, 100]
    assert exponent(sizes, [5 * size**1.75 for size in sizes]) == pytest.approx(1.75)
    assert exponent(sizes, [4.0] * 4) == pytest.approx(0, abs=1e-12)
    # Noise that is alike on both sides of the line leaves its slope.
    assert exponent([1, 2, 4, 8], [1, 4 * 1.1, 16 * 1.1, 64]) == pytest.approx(2)
    for wrong in (([2, 2], [1, 2]), ([1, 2], [0, 1]), ([1, 2, 4], [1, 2])):
        with pytest.raises(ValueError, match="expected a positive cost for each of two sizes or more"):
            exponent(*wrong)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_grids_are_of_the_ops_shapes(device: str) -> None:
    axes = {"info_nce": "BD", "word_region_scores": "BRTD", "max_sim": "BRTD"}
    assert {op: "".join(grid.sizes) for op, grid in GRIDS[device].items()} == {
        **axes, "similarity_topk": "BD", "retrieval_ranks": "BD", "gumbel_assign": "BS",
    }  # fmt: skip
    for op, grid in GRIDS[device].items():
        fields = set(WORKLOADS[op].parity._fields)
        assert set(grid.shape) | {"value_width"} >= fields >= set(grid.shape)
        assert set().union(*grid.fields.values()) <= fields
        for sizes in grid.sizes.values():
            assert len(sizes) >= 4 and {b / a for a, b in itertools.pairwise(sizes)} == {2.0}


def test_fits_of_small_problems() -> None:
    found = {(e["op"], e["axis"], e["variant"]): e for e in scaling.measure(list(SMALL), "cpu", 2, SMALL)}
    pairs = [(op, axis) for op, grid in SMALL.items() for axis in grid.sizes]
    assert set(found) == {(op, axis, name) for op, axis in pairs for name in ("jrl cpu", "eager")}
    ours = found["info_nce", "B", "jrl cpu"]
    assert ours["values"] == [32, 64, 128] and ours["shape"] == [64, 64, 16]
    assert ours["expected"] == pytest.approx(2) and ours["pass"] == "forward+backward"
    assert ours["exponent"] == exponent(ours["values"], ours["milliseconds"])
    assert found["info_nce", "D", "eager"]["expected"] == pytest.approx(1)
    assert found["word_region_scores", "T", "eager"]["expected"] == pytest.approx(1)
    # The Gram form costs R more for each region until contexts are the cheaper.
    assert 1 < found["word_region_scores", "R", "jrl cpu"]["expected"] < 2
    assert found["retrieval_ranks", "B", "eager"]["pass"] == "forward"


def test_a_variant_that_fails_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = WORKLOADS["info_nce"]

    def eager(x: torch.Tensor, **given: Any) -> torch.Tensor:
        if x.shape[0] in (limit, 128):
            raise NotImplementedError("too large\nfor me")
        return factor * real.peers["eager"](x=x, **given)

    monkeypatch.setitem(WORKLOADS, "info_nce", real._replace(peers={"eager": eager}))
    grid = {"info_nce": SMALL["info_nce"]._replace(sizes={"B": (32, 64, 128)})}

    def fits() -> dict[bool, dict[str, Any]]:
        found = scaling.measure(["info_nce"], "cpu", 1, grid)
        return {"refused" in entry: entry for entry in found if entry["variant"] == "eager"}

    factor, limit = 1.0, 128
    found = fits()
    assert found[True]["refused"] == "B=128: too large" and found[False]["values"] == [32, 64]
    limit = 64
    assert fits().keys() == {True}, "one size makes no line"
    factor, limit = 1.01, 128
    (refused,) = fits().values()
    assert refused["refused"].startswith("disagrees with float64 by 0.01")


def test_fits_join_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(GRIDS, "cpu", SMALL)
    monkeypatch.setattr(scaling, "commit", lambda: "abc")
    other = {"op": "max_sim", "axis": "B", "variant": "eager", "refused": "kept"}
    stale = {"op": "info_nce", "axis": "B", "variant": "eager", "refused": "goes"}
    about = machine("cpu")
    kept = {**about, "commit": "old", "rates": {}, "rows": [], "models": [1], "scaling": [other, stale]}
    (tmp_path / "results.json").write_text(json.dumps({**kept, "models": []}))
    options = ["--device", "cpu", "--op", "info_nce", "--out", str(tmp_path)]
    assert scaling.main(options) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["commit"] == "old" and result["models"] == []
    assert result["scaling"][0] == other and stale not in result["scaling"]
    assert len(result["scaling"]) == 5 and result["scaling"][1]["commit"] == "abc"
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "info_nce             B jrl cpu" in capsys.readouterr().out
    (tmp_path / "results.json").write_text(json.dumps({**kept, "device": "another"}))
    assert scaling.main(options) == 1
    assert "expected device" in capsys.readouterr().err


MEMORY = """
import json
from benchmarks import scaling
grid = scaling.GRIDS["cpu"]["info_nce"]
grid = grid._replace(shape={**grid.shape, "width": 32}, sizes={"B": (1024, 2048, 4096)})
held = scaling.memory("info_nce", grid, "cpu")
print(json.dumps({name: scaling.exponent(list(sizes), list(sizes.values())) for name, sizes in held.items()}))
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="peak memory is read from /proc")
def test_memory_of_the_fused_loss_grows_with_the_batch_and_eagers_with_its_square() -> None:
    # In a process of its own: here other tests have left freed blocks behind.
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fitted = json.loads(done.stdout)
    assert 1.95 < fitted["eager"] < 2.05
    assert fitted["jrl cpu"] < 1.4
