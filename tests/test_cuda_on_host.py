"""The emulation that tests of csrc/cuda run on: it computes what a GPU would, and stops where a GPU would hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cuda_on_host

pytestmark = pytest.mark.skipif(cuda_on_host.compiler() is None, reason="needs a C++ compiler")

SOURCE = """
#include "jrl/cuda_launch.h"
#include "jrl/registry.h"

// Sum of each block's part: shuffles within warps, shared memory between them.
__global__ void block_sum(const float* x, float* out, int count) {
  JRL_DYNAMIC_SHARED(float, partial);
  const int at = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  float value = at < count ? x[at] : 0.0f;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  if (lane == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += partial[i];
    out[blockIdx.x] = total;
  }
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_down_sync(~0u, lane, 3);
  out[32 + lane] = __shfl_up_sync(~0u, lane, 5);
  out[64 + lane] = __shfl_sync(~0u, lane, 7, 16);
  out[96 + lane] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
  out[128 + lane] = __any_sync(~0u, lane == 9) * 2 + __all_sync(~0u, lane < 31);
}

__global__ void divergent(int* out) {
  if (threadIdx.x < 5) __syncwarp();
  __syncthreads();
  out[0] = 1;
}

cudaError_t block_sum_cuda(const float* x, float* out, int blocks, int threads, int count, cudaStream_t stream) {
  JRL_LAUNCH(block_sum, blocks, threads, threads / 32 * sizeof(float), stream, x, out, count);
  return cudaGetLastError();
}
cudaError_t shuffles_cuda(int* out, cudaStream_t stream) {
  JRL_LAUNCH(shuffles, 1, 32, 0, stream, out);
  return cudaGetLastError();
}
cudaError_t divergent_cuda(int* out, cudaStream_t stream) {
  JRL_LAUNCH(divergent, 1, 64, 0, stream, out);
  return cudaGetLastError();
}
JRL_LAUNCHER(block_sum_cuda);
JRL_LAUNCHER(shuffles_cuda);
JRL_LAUNCHER(divergent_cuda);
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulation")
    (path / "trial.cu").write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def launch(folder: Path) -> Any:
    return cuda_on_host.Host(cuda_on_host.build(folder, [folder / "trial.cu"]))


def test_blocks_warps_and_shared_memory(launch: Any) -> None:
    x = torch.arange(1000.0)
    out = torch.full((4,), torch.nan)
    launch("block_sum_cuda", x.device, x.data_ptr(), out.data_ptr(), 4, 256, 1000)
    assert torch.equal(out, torch.stack([part.sum() for part in x.split(256)]))


def test_collectives(launch: Any) -> None:
    out = torch.full((5, 32), -1, dtype=torch.int32)
    launch("shuffles_cuda", out.device, out.data_ptr())
    lane = torch.arange(32)
    assert out[0].tolist() == torch.where(lane < 29, lane + 3, lane).tolist()
    assert out[1].tolist() == torch.where(lane >= 5, lane - 5, lane).tolist()
    assert out[2].tolist() == (lane // 16 * 16 + 7).tolist()
    assert set(out[3].tolist()) == {sum(1 << i for i in range(0, 32, 3))}
    assert out[4].tolist() == [2] * 32


def test_a_barrier_that_some_miss_is_an_error(folder: Path, launch: Any) -> None:
    """In a process of its own, since it is aborted."""
    code = f"""
import pathlib, torch
from tests import cuda_on_host
out = torch.zeros(1, dtype=torch.int32)
host = cuda_on_host.Host(cuda_on_host.load(pathlib.Path({str(folder)!r})))
host("divergent_cuda", "cpu", out.data_ptr())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=cuda_on_host.ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "wait for others that never come" in done.stderr


def test_a_source_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "trial.cu"
    source.write_text("void f() { undeclared(); }\n")
    with pytest.raises(RuntimeError, match="undeclared"):
        cuda_on_host.build(tmp_path, [source])
