"""The parts of the demo's report: cost of the loss, curves, and the document itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from jrl.demo import loss_cost
from jrl.demo.document import Code, Heading, Paragraph, Picture, Table, to_html, to_markdown
from jrl.demo.figures import read_curves, save_curves, save_loss_cost


def test_loss_cost_measures_both_losses(tmp_path: Path) -> None:
    cost = loss_cost.measure((64, 1024), width=32)
    small, large = cost["rows"]
    assert large["eager"]["seconds"] > small["eager"]["seconds"]
    if large["eager"]["extra_bytes"] is not None:
        # at least the logits, the log-probabilities and a gradient
        assert large["eager"]["extra_bytes"] > 3 * 4 * 1024**2
        if cost["backend"] == "cpu":
            assert large["fused"]["extra_bytes"] < large["eager"]["extra_bytes"]
    save_loss_cost(cost, tmp_path / "cost.png")
    for row in cost["rows"]:
        row["fused"]["extra_bytes"] = None
    save_loss_cost(cost, tmp_path / "time.png")
    with Image.open(tmp_path / "cost.png") as both, Image.open(tmp_path / "time.png") as one:
        assert both.width > one.width


def test_loss_cost_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = loss_cost.measure((8, 16, 32), width=8, budget=0.0)
    assert [row["batch"] for row in cost["rows"]] == [8]
    assert list(cost["left_out"]) == ["16", "32"]
    monkeypatch.setattr(loss_cost, "_free_memory", lambda device: 10_000)
    cost = loss_cost.measure((8, 64), width=8)
    assert [row["batch"] for row in cost["rows"]] == [8]
    assert "MiB are free" in cost["left_out"]["64"]
    monkeypatch.setattr(loss_cost, "_reset_peak", lambda: False)
    assert loss_cost.measure((8,), width=8)["rows"][0]["eager"]["extra_bytes"] is None


def test_loss_cost_refuses_losses_that_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_cost, "eager_loss", lambda x, y, scale: (scale * x @ y.T).mean())
    with pytest.raises(RuntimeError, match="at batch 8 the fused loss is"):
        loss_cost.measure((8,), width=8)


def test_loss_cost_without_the_extension_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JRL_BACKEND", "reference")
    cost = loss_cost.measure((8,), width=8)
    assert cost["backend"] == "reference"
    assert cost["reference_because"] == "JRL_BACKEND=reference"


def test_curves_of_a_resumed_run_take_the_later_value(tmp_path: Path) -> None:
    for piece, steps in enumerate((range(0, 60, 10), range(40, 100, 10))):
        with SummaryWriter(str(tmp_path), filename_suffix=str(piece)) as writer:
            for step in steps:
                writer.add_scalar("train/contrastive", piece, step, walltime=1e9 + 1000 * piece + step)
    curve = read_curves(tmp_path)["train/contrastive"]
    assert curve == [(step, float(step >= 40)) for step in range(0, 100, 10)]
    save_curves({"train/contrastive": curve}, tmp_path / "curves.png", batch_size=4)
    with pytest.raises(ValueError, match="no TensorBoard events"):
        read_curves(tmp_path / "absent")


def test_documents_escape_what_they_are_given(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    blocks: list[Any] = [
        Heading("a < b"),
        Paragraph("`x` & **y**"),
        Table(("name", "value", ""), [("p|q", "1", "missed by 2 points")]),
        Picture(tmp_path / "a.png", 'the "first"'),
        Code("<tag>"),
    ]
    text, page = to_markdown(blocks), to_html(blocks, "t & u")
    assert "| p\\|q | 1 | missed by 2 points |" in text
    assert '![the "first"](a.png)' in text
    assert "<h2>a &lt; b</h2>" in page
    assert "<p><code>x</code> &amp; <strong>y</strong></p>" in page
    assert '<td class="bad">missed by 2 points</td>' in page
    assert "<title>t &amp; u</title>" in page
    assert "&lt;tag&gt;" in page
    assert 'alt="the &quot;first&quot;"' in page
