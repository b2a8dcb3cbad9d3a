"""What partition_nce owes besides its values: registration, compilation, autocast, determinism, refusals, messages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from jrl_kernels import noise_log_partition, partition_nce
from jrl_kernels.ops.partition_nce.cases import SHAPES, Shape, bytes_moved, flops, make_inputs
from tests.ops.conformance import BACKENDS, FUSED, value_and_gradients


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_opcheck(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of schema, fake tensors, autograd registration and AOT dispatch, on the calls the op makes."""
    calls: list[tuple[Any, ...]] = []
    real = torch.ops.jrl.partition_nce_forward

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(torch.ops.jrl, "partition_nce_forward", record)
    for masked in (False, True):
        partition_nce(**make_inputs(SHAPES["ragged"], device=device, masked=masked), backend=backend)
    with torch.no_grad():
        partition_nce(
            **{k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in
               make_inputs(SHAPES["tiny"], device=device).items()},
            backend=backend,
        )  # fmt: skip
    monkeypatch.undo()
    assert [arguments[-2] for arguments in calls] == [True, True, False]
    for arguments in calls:
        torch.library.opcheck(real.default, arguments)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiles_whole(backend: str, device: str) -> None:
    torch._dynamo.reset()
    for masked in (False, True):
        arguments = make_inputs(SHAPES["ragged"], device=device, masked=masked)
        call = partial(partition_nce, backend=backend)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
        eager, graph = value_and_gradients(call, arguments), value_and_gradients(compiled, arguments)
        torch.testing.assert_close(graph, eager)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**arguments), call(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_graph_reads_nothing_beyond_the_bank(dtype: torch.dtype) -> None:
    """It was traced without the check at the door."""
    torch._dynamo.reset()
    compiled = torch.compile(partial(partition_nce, backend="cpu"), fullgraph=True, backend="aot_eager")
    arguments = make_inputs(SHAPES["tiny"], dtype=dtype)
    assert compiled(**arguments).isfinite()
    for wrong in (-(1 << 40), 1 << 40):
        arguments["negative_index"][0, 0] = wrong
        with pytest.raises((RuntimeError, IndexError)):
            compiled(**arguments)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """A captured step replays on new numbers: nothing in it reads the GPU's memory on the host."""
    shape = Shape(64, 1000, 128, 3, 200)
    arguments = make_inputs(shape, dtype=torch.bfloat16, device="cuda", masked=True)
    leaves = [arguments[k] for k in ("query", "scale")]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(partition_nce(**arguments), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = partition_nce(**arguments)
        gradients = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        arguments["query"].copy_(arguments["query"].flip(0))
    graph.replay()
    expected = partition_nce(**arguments)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_a_bank_of_more_elements_than_32_bits_count() -> None:
    bank = torch.zeros(20_000_000, 128, dtype=torch.bfloat16, device="cuda")
    bank[-1] = 1.0
    query = torch.ones(1, 128, dtype=torch.bfloat16, device="cuda")
    index = torch.tensor([[19_999_999]], device="cuda")
    loss = partition_nce(query, bank, index, index - 1, scale=1.0, log_partition=0.0, backend="triton")
    assert float(loss) == pytest.approx(0.6931472, rel=1e-5)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_same_bits_twice(backend: str, device: str) -> None:
    arguments = make_inputs(Shape(33, 500, 40, 7, 300), device=device, masked=True)
    first, second = (
        value_and_gradients(partial(partition_nce, backend=backend), arguments) for _ in range(2)
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_fused_backward_has_no_derivative(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["ragged"], device=device)
    (gradient,) = torch.autograd.grad(
        partition_nce(**arguments, backend=backend), arguments["query"], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="partition_nce.*backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_under_autocast_the_query_takes_the_banks_dtype(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["ragged"], device=device)
    half = arguments["query"].detach().bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        found = partition_nce(**{**arguments, "query": half}, backend=backend)
        plain = partition_nce(**arguments, backend=backend)
    wide = partition_nce(**{**arguments, "query": half.float()}, backend=backend)
    torch.testing.assert_close(found, wide, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain, partition_nce(**arguments, backend=backend), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_gradients_have_their_inputs_dtype(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["ragged"], dtype=torch.bfloat16, device=device)
    found = value_and_gradients(partial(partition_nce, backend=backend), arguments)
    assert found["output 0"].dtype == found["d scale"].dtype == torch.float32
    assert found["d query"].dtype == torch.bfloat16


def test_costs() -> None:
    shape = Shape(2, 100, 3, 4, 5)
    assert flops(shape, backward=False) == 2 * 2 * 9 * 3
    assert flops(shape, backward=True) == 2 * flops(shape, backward=False)
    assert bytes_moved(shape, torch.float32, backward=False) == 2 * 9 * (3 * 4 + 8) + 2 * 3 * 4


QUERY, BANK = torch.randn(4, 3), torch.randn(9, 3)
POSITIVE, NEGATIVE = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 5, dtype=torch.int64)
GOOD: dict[str, Any] = {
    "query": QUERY,
    "bank": BANK,
    "positive_index": POSITIVE,
    "negative_index": NEGATIVE,
    "scale": 1.0,
    "log_partition": 0.0,
}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": 1.0}, TypeError, "query must be a tensor, got float 1.0"),
    ({"query": QUERY.long()}, TypeError, "query must be float32, bfloat16, float16 or float64"),
    ({"query": QUERY[0]}, ValueError, r"query must have shape \[B, D\], got \[3\]"),
    ({"bank": BANK[:, :2]}, ValueError, r"bank must have shape \[N, D\] with D = 3, got \[9, 2\]"),
    ({"bank": BANK.double()}, TypeError, "bank must be torch.float32 like query, got torch.float64"),
    ({"bank": BANK.to("meta")}, ValueError, "bank must be on cpu like query, got meta"),
    ({"bank": BANK.clone().requires_grad_()}, ValueError, "bank has no gradient and must not require one"),
    ({"negative_index": NEGATIVE.int()}, TypeError, "negative_index must be int64, got torch.int32"),
    ({"negative_index": NEGATIVE[0]}, ValueError, r"negative_index must have shape \[B, Q\].*got \[5\]"),
    ({"negative_index": NEGATIVE[:3]}, ValueError, r"negative_index must have shape \[B, Q\] with B = 4"),
    ({"negative_index": NEGATIVE - 2}, ValueError, r"negative_index must hold indices in \[0, 9\)"),
    ({"negative_index": NEGATIVE.to("meta")}, ValueError, "negative_index must be on cpu like query"),
    ({"scale": "1"}, TypeError, "scale must be a number or a 0-d tensor, got str '1'"),
]
LOSS_ALONE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"positive_index": 3}, TypeError, "positive_index must be a tensor, got int 3"),
    ({"positive_index": POSITIVE.int()}, TypeError, "positive_index must be int64, got torch.int32"),
    ({"positive_index": POSITIVE + 9}, ValueError, r"positive_index must hold indices in \[0, 9\)"),
    ({"positive_index": POSITIVE[:, :0]}, ValueError, r"positive_index must have at least one column, got \[4, 0\]"),
    ({"negative_index": NEGATIVE[:, :0]}, ValueError, r"negative_index must have at least one column, got \[4, 0\]"),
    ({"positive_mask": POSITIVE}, TypeError, "positive_mask must be boolean"),
    ({"positive_mask": POSITIVE[:3] == 0}, ValueError, r"positive_mask must have shape \[B, K\] with B = 4"),
    ({"positive_mask": NEGATIVE == 0}, ValueError, r"positive_index must have shape \[B, K\] with .*K = 5"),
    ({"positive_mask": (POSITIVE == 0).to("meta")}, ValueError, "positive_mask must be on cpu like query"),
    ({"log_partition": None}, TypeError, "log_partition must be a number or a 0-d tensor, got NoneType None"),
    ({"log_partition": QUERY}, ValueError, "log_partition must be a 0-d tensor or a number"),
    ({"log_partition": torch.zeros((), requires_grad=True)}, ValueError, "log_partition is a constant"),
    ({"backend": "cudnn"}, ValueError, "backend must be 'auto' or one of .*got 'cudnn'"),
]  # fmt: skip


def noise(**given: Any) -> torch.Tensor:
    return noise_log_partition(given["query"], given["bank"], given["negative_index"], scale=given["scale"])


@pytest.mark.parametrize(
    ("function", "name", "changed", "error", "message"),
    [
        *((partition_nce, "partition_nce", *case) for case in [*BAD, *LOSS_ALONE]),
        *((noise, "noise_log_partition", *case) for case in BAD),
        (noise, "noise_log_partition", {"negative_index": NEGATIVE[:, :0]}, ValueError, r"at least one index, got \[4, 0\]"),
    ],
)  # fmt: skip
def test_messages(
    function: Callable[..., Any], name: str, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        function(**{**GOOD, **changed})


def test_a_width_beyond_the_triton_kernel_is_refused() -> None:
    from jrl_kernels.ops.partition_nce import triton_kernel

    wide = torch.zeros(1, triton_kernel.WIDEST + 1)
    index = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="takes D up to .*use backend='reference'"):
        triton_kernel.forward(wide, wide, index, index, None, torch.ones(()), torch.zeros(()), False)
