"""The CUDA kernels of the similarity ops on a CPU, in the emulation of tests/cuda_on_host: the integers of the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from jrl_kernels import _extension
from jrl_kernels._checks import accumulation
from jrl_kernels._positives import parse
from jrl_kernels.ops.similarity import cuda, gpu, reference, search
from jrl_kernels.ops.similarity.cases import POSITIVES, Shape, make_inputs
from tests import cuda_on_host

pytestmark = [
    pytest.mark.skipif(cuda_on_host.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("nan_filled_allocations", "on_host"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = cuda_on_host.ROOT / "csrc" / "cuda" / "similarity.cu"
    return cuda_on_host.Host(cuda_on_host.build(tmp_path_factory.mktemp("similarity"), [source]))


@pytest.fixture
def on_host(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run in the emulation, on CPU tensors, with tiles that no problem of these tests fits into."""
    monkeypatch.setattr(_extension, "launch_cuda", host)
    monkeypatch.setattr(cuda, "BLOCK", (9, 300))


def ranks(x: Tensor, y: Tensor, positives: Any, metric: str) -> tuple[Tensor, Tensor]:
    """By the kernels and by the reference."""
    which = parse("retrieval_ranks", positives, len(x), len(y), x)
    mask = reference.positive_mask(which, len(x), len(y))
    truth = reference.ranks(reference.scores(x, y, metric), mask)
    return search.ranks(search.Pairs(x, y, metric), which, cuda), truth


@pytest.mark.parametrize("metric", ["cosine", "dot", "order"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(metric: str, dtype: torch.dtype) -> None:
    for kind in POSITIVES:
        inputs = make_inputs(Shape(14, 310, 37), dtype=dtype, metric=metric, positives=kind, duplicates=True)
        found, truth = ranks(inputs["x"], inputs["y"], inputs.get("positives"), metric)
        assert torch.equal(found, truth), kind


@pytest.mark.parametrize("metric", ["cosine", "dot", "order"])
@pytest.mark.parametrize(("dtype", "k"), list(zip(DTYPES, (1, 40, 310), strict=True)))
def test_topk(metric: str, dtype: torch.dtype, k: int) -> None:
    inputs = make_inputs(Shape(10, 310, 37), dtype=dtype, metric=metric, exclude=True, duplicates=True)
    x, y, exclude = inputs["x"], inputs["y"], inputs["exclude"]
    values, indices = search.topk(search.Pairs(x, y, metric), k, exclude, cuda)
    scores = reference.scores(x, y, metric).to(accumulation(dtype))
    truth = reference.largest(scores, k, exclude[0][:, None] == exclude[1])
    assert torch.equal(indices, truth[1])
    torch.testing.assert_close(values, truth[0], rtol=1e-6, atol=0)


def test_topk_of_long_rows() -> None:
    """More candidates than a block's buffer holds, in rows that grow to their end."""
    x, y = torch.ones(2, 3), torch.arange(2500.0)[:, None].expand(2500, 3).contiguous()
    for k in (1, 700, 2048):
        values, indices = search.topk(search.Pairs(x, y, "dot"), k, None, cuda)
        assert indices.tolist() == [list(range(2499, 2499 - k, -1))] * 2
        assert values[0].tolist() == [3.0 * j for j in range(2499, 2499 - k, -1)]


@pytest.mark.parametrize("metric", ["min", "max"])
def test_agreement(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, width, generator=generator) for width in (7, 40))
    ids = torch.arange(30)
    values, indices = search.topk(search.Pairs(a, a, metric, b, b), 30, (ids, ids), cuda)
    combine = torch.minimum if metric == "min" else torch.maximum
    scores = combine(reference.scores(a, a, "dot"), reference.scores(b, b, "dot")).float()
    truth = reference.largest(scores, 30, torch.eye(30, dtype=torch.bool))
    assert torch.equal(indices, truth[1])
    torch.testing.assert_close(values, truth[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", ["cosine", "dot", "order"])
def test_nan_infinite_and_zero(metric: str) -> None:
    inputs = make_inputs(Shape(8, 20, 37), metric=metric)
    x, y = inputs["x"], inputs["y"]
    x[1, 0], x[2], y[3, 5], y[4, 1], y[5] = math.nan, 0.0, math.nan, math.inf, 0.0
    found, truth = ranks(x, y, None, metric)
    assert torch.equal(found, truth)
    _, indices = search.topk(search.Pairs(x, y, metric), 20, None, cuda)
    assert torch.equal(indices, reference.largest(reference.scores(x, y, metric).float(), 20, None)[1])


def test_halves_are_read_exactly() -> None:
    """Normal, subnormal, infinite and NaN bit patterns of both formats, as the one coordinate that a score is read off."""
    edges = [0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7C01, 0x7F80, 0x7F81, 0x7FFF]
    bits = torch.cat(
        [torch.arange(-(1 << 15), 1 << 15, 97), torch.tensor(edges), torch.tensor(edges) - (1 << 15)]
    )
    starts = torch.zeros(len(bits), dtype=torch.int64)
    group = search.Listed(starts, starts + 1, torch.zeros(1, dtype=torch.int64))
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.to(torch.int16).view(dtype)[:, None].contiguous()
        pairs = search.Pairs(x, torch.ones(1, 1, dtype=dtype), "dot")
        found = cuda.best(pairs, search.rounding(pairs), group)
        torch.testing.assert_close(found, x[:, 0].double(), rtol=0, atol=0, equal_nan=True)


def test_order_tile_past_its_edges() -> None:
    x, y = torch.randn(70, 37), torch.randn(130, 37)
    tile = torch.full((70, 130), math.nan)
    cuda.fill(x, y, "order", tile)
    torch.testing.assert_close(tile.double(), reference.scores(x, y, "order"), rtol=1e-5, atol=1e-5)


def test_keys_keep_their_order() -> None:
    scores = torch.tensor([math.inf, 3.0, 1e-45, 0.0, -1e-45, -2.0, -math.inf])
    bits = scores.view(torch.int32)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long()
    keys = (ordered << 32) | (0xFFFFFFFF - torch.arange(7))
    assert torch.equal(keys.sort(descending=True).values, keys)
    values, indices = gpu.decode(keys)
    assert torch.equal(values, scores)
    assert indices.tolist() == list(range(7))
    empty = gpu.decode(gpu.nothing(search.Pairs(torch.ones(2, 1), torch.ones(5, 1), "dot"), 3))
    assert torch.equal(empty[0], torch.full((2, 3), -math.inf))
    assert torch.equal(empty[1], torch.full((2, 3), -1))


@pytest.mark.parametrize("k", [1, 200, 256, 257, 512, 513, 1024, 2047, 2048])
def test_buffer_has_room_for_what_threads_add(k: int) -> None:
    capacity = cuda.capacity(k)
    assert capacity & (capacity - 1) == 0
    assert capacity >= k + 2 * cuda.THREADS
    assert capacity * 8 <= 48 << 10


def test_k_beyond_a_blocks_memory_is_refused() -> None:
    x = torch.ones(1, 1)
    with pytest.raises(NotImplementedError, match="k is at most 2048, got 2049"):
        gpu.nothing(search.Pairs(x, x, "dot"), 2049)
