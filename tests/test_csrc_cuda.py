"""Every CUDA source compiles for 8.0, 9.0a and 10.0 and keeps its values in registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NONE = pytest.param(ROOT, marks=pytest.mark.skip(reason="csrc/cuda holds no source"))
TARGETS = ("80", "90a", "100")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc")
    return found


def spills(nvcc: str, source: Path, target: str, output: Path) -> dict[str, int]:
    """Bytes of spill stores and loads of each kernel, as ptxas reports them."""
    command = [nvcc, "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", f"-I{ROOT / 'csrc' / 'include'}"]
    command += ["-gencode", f"arch=compute_{target},code=sm_{target}", str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = {}
    kernel = ""
    for line in result.stderr.splitlines():
        entry = re.search(r"Compiling entry function '(\w+)'|Function properties for (\w+)", line)
        if entry:
            kernel = entry.group(1) or entry.group(2)
        bytes_spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if bytes_spilled:
            found[kernel] = int(bytes_spilled.group(1)) + int(bytes_spilled.group(2))
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES or [NONE], ids=lambda path: path.stem)
def test_cuda_source_compiles_without_spills(nvcc: str, source: Path, target: str, tmp_path: Path) -> None:
    found = spills(nvcc, source, target, tmp_path / "kernels.cubin")
    assert found, "no kernel in this source"
    assert not {kernel: size for kernel, size in found.items() if size}


@pytest.mark.parametrize("target", TARGETS)
def test_the_check_tells_spills_from_none(nvcc: str, target: str, tmp_path: Path) -> None:
    source = tmp_path / "trial.cu"
    source.write_text(
        """
        #include "jrl/registry.h"
        __global__ void calm(float* x) { x[threadIdx.x] *= 2; }
        // 256 values live at once, in at most 32 registers a thread.
        __global__ void __launch_bounds__(1024, 2) greedy(float* x) {
          float values[256];
        #pragma unroll
          for (int i = 0; i < 256; ++i) values[i] = x[i * 1024 + threadIdx.x];
        #pragma unroll
          for (int i = 0; i < 256; ++i) x[(255 - i) * 1024 + threadIdx.x] = values[i] * values[(i * 7) % 256];
        }
        cudaError_t calm_cuda(float* x, cudaStream_t stream) {
          calm<<<1, 32, 0, stream>>>(x);
          return cudaGetLastError();
        }
        JRL_LAUNCHER(calm_cuda);
        """
    )
    found = spills(nvcc, source, target, tmp_path / "kernels.cubin")
    assert {re.sub(r"^_Z\d+|Pf$", "", kernel): size > 0 for kernel, size in found.items()} == {
        "calm": False,
        "greedy": True,
    }


def test_a_source_that_does_not_compile_is_caught(nvcc: str, tmp_path: Path) -> None:
    source = tmp_path / "trial.cu"
    source.write_text("__global__ void kernel() { undeclared(); }\n")
    with pytest.raises(AssertionError, match="undeclared"):
        spills(nvcc, source, TARGETS[0], tmp_path / "kernels.cubin")
