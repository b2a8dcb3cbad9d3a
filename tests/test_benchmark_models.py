"""Training steps of whole models: that both variants are the same model, what is written, and how the largest batch is found."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import interleave
from benchmarks.models import __main__ as command
from benchmarks.models import limits, steps
from benchmarks.models.limits import GIB, fits, largest, peak
from benchmarks.models.steps import MODELS, VARIANTS, Trainer, build, disagreement, make_batch
from jrl.objectives import ContrastiveObjective

LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="a process's memory is read from /proc")


@pytest.mark.parametrize("name", MODELS)
def test_fused_and_eager_are_the_same_model(name: str) -> None:
    assert disagreement(name, "cpu") < 1e-5
    fused, eager = (build(name, variant, "cpu") for variant in VARIANTS)
    assert fused.state_dict().keys() == eager.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), eager.parameters(), strict=True))


def test_the_variants_differ_in_what_is_measured() -> None:
    assert type(build("CLIP", "fused", "cpu").objective) is ContrastiveObjective
    assert type(build("CLIP", "eager", "cpu").objective) is steps.EagerObjective
    assert type(build("GroupViT", "fused", "cpu")) is not type(build("GroupViT", "eager", "cpu"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_updates_every_parameter(name: str, variant: str) -> None:
    trainer = Trainer(name, variant, "cpu")
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    batch = make_batch(MODELS[name].sizes["cpu"], 4, "cpu", torch.float32)
    trainer(batch)
    still = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    # The position of a token that no text has, and the trunk's pooler or head, have no gradient.
    assert len(still) < 0.05 * len(before), still
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 63, 64, 100, 1000, 4097])
@pytest.mark.parametrize("start", [2, 64, 1024])
def test_the_largest_batch_is_bracketed(bound: int, start: int) -> None:
    tried: list[int] = []

    def fit(batch: int) -> bool:
        tried.append(batch)
        return batch <= bound

    found = largest(fit, start)
    assert found == 0 if bound < 2 else found <= bound < found + max(1, found // 16) + 1
    assert len(tried) == len(set(tried)) and max(tried) <= max(start, 2 * bound)


def test_a_model_that_fits_nowhere_ends_the_search() -> None:
    assert largest(lambda batch: False, 64) == 0


@LINUX
def test_peaks_are_measured_in_a_process_of_their_own() -> None:
    small, large = peak("CLIP", "fused", 64, "cpu"), peak("CLIP", "fused", 2048, "cpu")
    assert 2**27 < small < large < GIB
    assert large - small > 2048 * 3 * 32 * 32 * 4  # the pictures alone
    assert not fits("CLIP", "eager", 64, "cpu", small // 2)
    # Far beyond the limit: refused its memory rather than given it.
    with pytest.raises(MemoryError, match="batch 4194304 needs more memory"):
        peak("CLIP", "fused", 4194304, "cpu", GIB)


@LINUX
def test_an_error_that_is_not_about_memory_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def broken(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    class Pipe:
        def send(self, value: Any) -> None:
            sent.append(value)

    monkeypatch.setattr(limits, "step", broken)
    limits._child(Pipe(), "CLIP", "fused", 4, torch.get_num_threads(), None)
    assert isinstance(sent[0], RuntimeError) and "mat1" in str(sent[0])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small batches, timed once, and memory by a formula of this test."""
    for name, workload in MODELS.items():
        sizes = {"cpu": workload.sizes["cpu"]._replace(batches=(4, 8))}
        monkeypatch.setitem(MODELS, name, workload._replace(sizes=sizes))

    def measured(name: str, variant: str, batch: int, device: str, limit: int | None = None) -> int:
        return (GIB // 100) * batch * (1 if variant == "fused" else 2)

    def once(ready: Any, device: str, repeats: int, warmup: int) -> Any:
        assert repeats >= 3
        return interleave(ready, device, repeats=1, warmup=0)

    monkeypatch.setattr(command, "peak", measured)
    monkeypatch.setattr(command, "interleave", once)
    monkeypatch.setattr(limits, "peak", measured)


def test_writes_what_it_measured_and_keeps_the_rest(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--out", str(tmp_path), "--limit", "1"]
    assert command.main(options) == 0
    path = tmp_path / "results.json"
    result = json.loads(path.read_text())
    assert result["torch"] == torch.__version__ and result["rows"] == []
    rows = result["models"]
    timed = [row for row in rows if "milliseconds" in row]
    assert {(r["model"], r["variant"], r["batch"]) for r in timed} == {
        (name, variant, batch) for name in MODELS for variant in VARIANTS for batch in (4, 8)
    }
    for row in timed:
        assert 0 < row["low"] <= row["milliseconds"] <= row["high"] and row["dtype"] == "float32"
        assert row["error"] < 1e-5 and row["peak_bytes"] > 0
    largest_rows = {(r["model"], r["variant"]): r for r in rows if "largest_batch" in r}
    assert len(largest_rows) == 4 and len(rows) == 12
    assert 94 <= largest_rows["CLIP", "fused"]["largest_batch"] <= 100
    assert 47 <= largest_rows["CLIP", "eager"]["largest_batch"] <= 50
    assert largest_rows["CLIP", "eager"]["limit_bytes"] == GIB
    shown = capsys.readouterr().out
    assert "largest that fits 1 GiB" in shown and "GroupViT" in shown
    # Again, one model: its rows are replaced, everything else stays.
    path.write_text(json.dumps({**result, "rows": [{"op": "info_nce"}], "scaling": [1]}))
    assert command.main([*options, "--model", "GroupViT", "--quick"]) == 0
    again = json.loads(path.read_text())
    assert again["rows"] == [{"op": "info_nce"}] and again["scaling"] == [1]
    assert [r for r in again["models"] if r["model"] == "CLIP"] == [r for r in rows if r["model"] == "CLIP"]
    assert [r["batch"] for r in again["models"] if r["model"] == "GroupViT"] == [4, 4]


def test_out_of_memory_and_disagreement_are_rows(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(name: str, variant: str, batch: int, device: str, limit: int | None = None) -> int:
        if variant == "eager":
            raise MemoryError("batch 4 needs more memory than it was given")
        return 1

    monkeypatch.setattr(command, "peak", measured)
    options = ["--device", "cpu", "--out", str(tmp_path), "--quick", "--model", "CLIP"]
    assert command.main(options) == 0
    fused, eager = json.loads((tmp_path / "results.json").read_text())["models"]
    assert eager["refused"] == "out of memory: batch 4 needs more memory than it was given"
    assert "milliseconds" not in eager and fused["milliseconds"] > 0
    real = steps.EagerObjective.forward

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss, stats = real(self, *args, **kwargs)
        return 1.01 * loss, stats

    monkeypatch.setattr(steps.EagerObjective, "forward", wrong)
    assert command.main(options) == 1
    rows = json.loads((tmp_path / "results.json").read_text())["models"]
    assert all(row["refused"].startswith("fused disagrees with eager by 0.0099") for row in rows)


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"device": "another machine"}))
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "got 'another machine': give another --out" in capsys.readouterr().err
    assert json.loads(path.read_text()) == {"device": "another machine"}
    for options in (["--limit", "0"], ["--model", "BLIP"]):
        with pytest.raises(SystemExit):
            command.main(options)
