"""The examples run, and with the host's own loss show the same first loss."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
HOSTS = {
    "open_clip": "open_clip",
    "lightly": "lightly",
    "metric_learning": "pytorch_metric_learning",
    "torchmultimodal": "torchmultimodal",
    "late_interaction": "late_interaction_kernels",
    "sentence_transformers": "sentence_transformers",
    "pylate": "pylate",
}


@pytest.mark.parametrize("name", HOSTS)
def test_the_example_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(HOSTS[name]) is None:
        pytest.skip(f"needs {HOSTS[name]}; make test installs it")
    example = EXAMPLES / f"{name}_training.py"
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shown = []
    for options in ([], ["--host"]):
        monkeypatch.setattr(sys, "argv", [str(example), "--steps", "2", "--batch", "16", *options])
        runpy.run_path(str(example), run_name="__main__")
        printed = capsys.readouterr().out
        assert re.search(r"^of 16, matched: \d+%$", printed, re.MULTILINE)
        shown += re.findall(r"step +1  loss (\d+\.\d+)", printed)
    assert len(shown) == 2 and float(shown[0]) == pytest.approx(float(shown[1]), abs=2e-4)
