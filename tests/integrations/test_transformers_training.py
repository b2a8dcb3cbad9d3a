"""Patched models where people train them: memory, torch.compile, Trainer, and the example."""

from __future__ import annotations

import pickle
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor

from benchmarks.measure import extra_memory
from jrl_kernels.integrations import transformers_forward
from jrl_kernels.integrations.transformers import ReturnLossCollator, apply_to_clip, undo
from tests.integrations.test_transformers import CASES, batch_for, clip, close, make


def test_the_logits_are_not_made() -> None:
    """At this batch the host holds several matrices of 16 MiB; the towers are the same on both sides."""
    theirs = make(CASES["clip"]).train()
    batch = batch_for(theirs, 2048)

    def step(model: Any) -> Callable[[], None]:
        return lambda: model(**batch, return_loss=True).loss.backward()

    host = extra_memory(step(theirs), "cpu")
    fused = extra_memory(step(apply_to_clip(theirs)), "cpu")
    if host is None or fused is None:
        pytest.skip("the memory of a process is read from /proc, which this system lacks")
    assert host - fused > 2 * 2048 * 2048 * 4


def test_torch_compile_takes_the_patched_model() -> None:
    model = apply_to_clip(make(CASES["clip"]).train())
    batch = batch_for(model)
    expected = model(**batch, return_loss=True).loss
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(**batch, return_loss=True)
    assert found.logits_per_text is None and close(found.loss, expected)


def test_jrl_kernels_does_not_import_transformers() -> None:
    code = "import sys, jrl_kernels, jrl_kernels.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "jrl_kernels.integrations.transformers")
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'transformers>=4.57'"):
        import jrl_kernels.integrations.transformers  # noqa: F401


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, model: Any) -> None:
        self.batch = batch_for(model, 8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.batch.items()}


def test_the_collator_asks_for_the_loss() -> None:
    pairs = Pairs(clip())
    batch = pickle.loads(pickle.dumps(ReturnLossCollator()))([pairs[0], pairs[1]])
    assert batch["return_loss"] is True and batch["pixel_values"].shape == (2, 3, 16, 16)
    assert ReturnLossCollator(lambda features: {"n": len(features)})([1, 2]) == {"n": 2, "return_loss": True}


def test_trainer_trains_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is not installed")
    losses = {}
    fused = mock.Mock(wraps=transformers_forward.info_nce)
    monkeypatch.setattr(transformers_forward, "info_nce", fused)
    for name in ("host", "fused"):
        model = make(CASES["clip"])
        pairs = Pairs(model)
        if name == "fused":
            apply_to_clip(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            max_steps=4,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=pairs, eval_dataset=pairs, data_collator=ReturnLossCollator()
        )
        trainer.train()
        evaluated = trainer.evaluate()
        losses[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        losses[name].append(evaluated["eval_loss"])
    assert len(losses["host"]) == 5 and fused.call_count == 4  # steps of one of the two
    assert losses["fused"] == pytest.approx(losses["host"], rel=1e-3)


def test_a_forward_on_the_instance_is_not_left_behind() -> None:
    """accelerate's prepare puts the forward that it finds, wrapped, on the instance, where it would stay the fused one."""
    model = apply_to_clip(make(CASES["clip"])).train()
    model.forward = model.forward
    with pytest.raises(ValueError, match="has a forward of its own, which keeps the fused one"):
        undo(model)
    del model.forward
    assert undo(model)(**batch_for(model), return_loss=True).logits_per_text is not None


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_picture_needs_its_text(name: str) -> None:
    model = make(CASES[name]).train()
    batch = batch_for(model)
    batch["pixel_values"] = batch["pixel_values"][:-1]
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        model(**batch, return_loss=True)
    rows = len(batch["pixel_values"])
    with pytest.raises(ValueError, match=f"the same number of rows, got {rows + 1} and {rows}"):
        CASES[name].apply(model)(**batch, return_loss=True)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[2] / "examples" / "transformers_clip.py"
    shown = {}
    for options in ([], ["--host"]):
        monkeypatch.setattr(sys, "argv", [str(example), "--steps", "3", "--batch", "8", *options])
        runpy.run_path(str(example), run_name="__main__")
        shown[bool(options)] = re.findall(r"step +1  loss (\d\.\d+)", capsys.readouterr().out)
    assert len(shown[True]) == 1 and float(shown[True][0]) == pytest.approx(float(shown[False][0]), abs=2e-4)
