"""The test suite's own fixtures and options do what the other tests rely on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
)
def test_uninitialised_memory_is_filled(nan_filled_allocations: None, dtype: torch.dtype) -> None:
    base = torch.zeros(2, 3, dtype=dtype)
    fresh = [
        torch.empty(5, dtype=dtype),
        torch.empty((2, 3), dtype=dtype),
        torch.empty_like(base),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
        base.new_empty(4),
        base.new_empty_strided((2, 3), (1, 2)),
        torch.zeros(1, dtype=dtype).resize_(6)[1:],
    ]
    for index, tensor in enumerate(fresh):
        if dtype.is_floating_point:
            assert tensor.isnan().all(), index
        else:
            assert (tensor == torch.iinfo(dtype).max).all(), index
    assert not base.any(), "memory that was initialised stays"


def test_an_output_that_nobody_wrote_shows(nan_filled_allocations: None) -> None:
    out = torch.empty(4)
    out[:3] = 1
    assert out.isnan().tolist() == [False, False, False, True]


def test_filling_ends_with_the_test() -> None:
    assert not torch.are_deterministic_algorithms_enabled()


SKIPPING = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    pass

@pytest.mark.gpu
def test_that_skips():
    pytest.skip("not today")
"""


@pytest.mark.parametrize(
    ("source", "arguments", "code", "said"),
    [
        (SKIPPING, (), 0, "skipped"),
        (SKIPPING, ("--forbid-skips",), 1, "--forbid-skips: "),
        ("def test_fine():\n    pass\n", ("--forbid-skips",), 1, "--forbid-skips: 0 skipped, 0 ran"),
    ],
)
def test_a_gpu_test_may_be_forbidden_to_skip(
    tmp_path: Path, source: str, arguments: tuple[str, ...], code: int, said: str
) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "test_trial.py").write_text(source)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        *arguments,
        "test_trial.py",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == code, result.stdout
    assert said in result.stdout


def test_a_gpu_run_leaves_out_files_without_gpu_tests(tmp_path: Path) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "test_other.py").write_text("import no_such_module\n")
    (tmp_path / "test_gpu.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_fine():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "no_such_module" in result.stdout
    result = subprocess.run([*command, "--forbid-skips"], cwd=tmp_path, capture_output=True, text=True)
    assert "no_such_module" not in result.stdout
    assert result.returncode == (0 if torch.cuda.is_available() else 1)
