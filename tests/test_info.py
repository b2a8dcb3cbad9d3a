"""`python -m jrl_kernels.info`: complete, honest, and the same as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jrl_kernels import _dispatch, _extension, info

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def collected() -> dict:
    return info.collect()


def test_versions_and_hardware(collected: dict) -> None:
    versions = collected["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["jrl"] == "0.1.0"
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert collected["cpu"]["model"]
    assert len(collected["gpus"]) == torch.cuda.device_count()


def test_every_op_and_backend_is_listed(collected: dict) -> None:
    folders = {path.parent.name for path in (ROOT / "jrl_kernels" / "ops").glob("*/__init__.py")}
    assert set(collected["ops"]) == folders
    for op in collected["ops"].values():
        assert op["functions"]
        for backend in op["backends"].values():
            assert backend["serves"] == (backend["reason"] is None) == (backend["fix"] is None)
        assert op["backends"]["reference"]["serves"]
    assert "info_nce" in collected["ops"]["info_nce"]["functions"]


def test_json_on_the_command_line() -> None:
    command = [sys.executable, "-m", "jrl_kernels.info", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    parsed = json.loads(result.stdout)
    assert set(parsed) == {"versions", "cpu", "gpus", "extension", "ops"}


def test_text_says_what_serves_and_what_would_fix_the_rest(
    collected: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {
        "reference": _dispatch.Backend("reference", "m", lambda: None, lambda device, dtype: None),
        "cuda": _dispatch.Backend(
            "cuda", "m", lambda: ("no nvcc", "install CUDA"), lambda device, dtype: None
        ),
    }
    monkeypatch.setattr("jrl_kernels.ops.info_nce.op.BACKENDS", table)
    info.main([])
    text = capsys.readouterr().out
    assert "reference   serves\n" in text
    assert "cuda        does not serve: no nvcc\n" in text
    assert "to fix: install CUDA\n" in text
    assert torch.__version__ in text


def test_a_missing_extension_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_extension, "_load", lambda: ("it has not been built", "pip install -e ."))
    _extension.unavailable.cache_clear()
    try:
        info.main([])
        text = capsys.readouterr().out
        assert "missing: it has not been built" in text
        assert "cpu         does not serve: " in text
        assert info.collect()["extension"]["available"] is False
    finally:
        _extension.unavailable.cache_clear()


def test_what_was_compiled_is_shown() -> None:
    cuda = {
        "compiled": True,
        "nvcc": "13.0.88",
        "architectures": ["8.0", "9.0a"],
        "sources": ["a.cu"],
        "notes": ["n"],
    }
    build = {"openmp": False, "cpu_sources": ["a.cpp"], "compiler": "g++ 12", "cuda": cuda}
    lines = "\n".join(info._render_extension({"available": True, "build": build}))
    assert "a.cpp (g++ 12, without OpenMP: one thread)" in lines
    assert "a.cu (nvcc 13.0.88)" in lines
    assert "8.0 9.0a" in lines
    cuda.update(compiled=False, skipped={"reason": "nvcc was not found", "fix": "install it"})
    lines = "\n".join(info._render_extension({"available": True, "build": build}))
    assert "not compiled: nvcc was not found (to fix: install it)" in lines


def test_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        info.main(["--jsonn"])
    assert "unrecognized arguments: --jsonn" in capsys.readouterr().err
