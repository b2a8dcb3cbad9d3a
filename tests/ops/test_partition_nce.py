"""Values and gradients of noise-contrastive estimation against a memory bank: golden values, float64 truth, edges."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jrl_kernels import noise_log_partition, partition_nce
from jrl_kernels.ops.partition_nce import cpu, op
from jrl_kernels.ops.partition_nce.cases import SHAPES, Shape, bytes_moved, flops, make_inputs
from tests.ops.conformance import (
    BACKENDS,
    FUSED,
    FUSED_DTYPES,
    assert_close_to_truth,
    cast,
    det,
    value_and_gradients,
)

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
PRECISE = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}".replace("torch.", ""), marks=case.marks)
    for case in BACKENDS
    for dtype in TOLERANCE
    if not (case.id == "triton" and dtype == torch.float64)
]


def scored(positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
    """Queries and a bank that give these scores [B, K] and [B, Q]: row b's query picks out the b-th element."""
    queries, positives = positive.shape
    scores = torch.cat([positive, negative], 1)
    bank = (scores[..., None] * torch.eye(queries, dtype=scores.dtype)[:, None]).flatten(0, 1)
    index = torch.arange(scores.numel()).view(scores.shape)
    return {
        "query": torch.eye(queries, dtype=scores.dtype),
        "bank": bank,
        "positive_index": index[:, :positives],
        "negative_index": index[:, positives:],
    }


def judge(backend: str, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    """`arguments` are in `dtype`; the truth is the reference on the same numbers in float64."""
    fused, plain = (
        value_and_gradients(partial(partition_nce, backend=name), arguments)
        for name in (backend, "reference")
    )
    truth = value_and_gradients(partial(partition_nce, backend="reference"), cast(arguments, torch.float64))
    assert_close_to_truth(fused, plain, truth, dtype)


@pytest.mark.parametrize(("backend", "device", "dtype"), PRECISE)
class TestGolden:
    """AVID's official code."""

    @pytest.mark.parametrize(("positives", "expected"), [(1, 5.6987244320), (2, 3.9243501649)])
    def test_avid(
        self, backend: str, device: str, dtype: torch.dtype, positives: int, expected: float
    ) -> None:
        given = scored(det(3, positives, a=0.37), det(3, 5, a=0.53))
        given = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in given.items()}
        scale = torch.tensor(1 / 0.07, dtype=dtype, device=device)
        log_partition = noise_log_partition(
            given["query"], given["bank"], given["negative_index"], scale=scale
        )
        assert float(log_partition.exp()) == pytest.approx(265336.29981368, rel=TOLERANCE[dtype])
        loss = partition_nce(**given, scale=scale, log_partition=log_partition, backend=backend)
        assert float(loss) == pytest.approx(expected, rel=TOLERANCE[dtype])

    def test_formula(self, backend: str, device: str, dtype: torch.dtype) -> None:
        """Written out as probabilities of data and noise, term by term."""
        positive, negative = det(3, 2, a=0.37), det(3, 4, a=0.53)
        given = {
            k: v.to(device, dtype if v.is_floating_point() else None)
            for k, v in scored(positive, negative).items()
        }
        mass = 4 * 1.7
        total = 0.0
        for b in range(3):
            total -= sum(math.log(math.exp(s) / (math.exp(s) + mass)) for s in positive[b].tolist()) / 2
            total -= sum(math.log(mass / (math.exp(s) + mass)) for s in negative[b].tolist())
        loss = partition_nce(**given, scale=1.0, log_partition=math.log(1.7), backend=backend)
        assert float(loss) == pytest.approx(total / 3, rel=TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "device", "dtype"), FUSED_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(
    backend: str, device: str, dtype: torch.dtype, shape: str, nan_filled_allocations: None
) -> None:
    for masked in (False, True):
        for scale in (14.3, 100.0, 0.0, -3.0):
            arguments = make_inputs(SHAPES[shape], dtype=dtype, device=device, masked=masked, scale=scale)
            judge(backend, dtype, arguments)


def test_half_precision_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_inputs(SHAPES["tall"], dtype=torch.bfloat16, masked=True)
    whole = value_and_gradients(partial(partition_nce, backend="cpu"), arguments)
    monkeypatch.setattr(cpu, "GATHERED_ELEMENTS", 4 * 8 * 8)
    parts = value_and_gradients(partial(partition_nce, backend="cpu"), arguments)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: str) -> None:
    names = ("query", "scale")
    for masked in (False, True):
        arguments = make_inputs(Shape(4, 9, 3, 2, 5), dtype=torch.float64, masked=masked, scale=3.0)

        def loss(*values: Tensor, given: dict[str, Any] = arguments) -> Tensor:
            return partition_nce(**{**given, **dict(zip(names, values, strict=True))}, backend=backend)

        assert torch.autograd.gradcheck(loss, tuple(arguments[name] for name in names))
        if backend == "reference":
            assert torch.autograd.gradgradcheck(loss, tuple(arguments[name] for name in names))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_each_gradient_alone(backend: str, device: str) -> None:
    arguments = make_inputs(SHAPES["ragged"], device=device, masked=True)
    everything = value_and_gradients(partial(partition_nce, backend=backend), arguments)
    for name in ("query", "scale"):
        alone = {k: v.detach() if k in ("query", "scale") and k != name else v for k, v in arguments.items()}
        found = value_and_gradients(partial(partition_nce, backend=backend), alone)
        torch.testing.assert_close(found[f"d {name}"], everything[f"d {name}"], rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestEdges:
    def test_without_a_gradient_the_value_is_the_same(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device)
        with torch.no_grad():
            value = partition_nce(**arguments, backend=backend)
        assert not value.requires_grad
        torch.testing.assert_close(value, partition_nce(**arguments, backend=backend), rtol=1e-6, atol=0)

    def test_no_queries(self, backend: str, device: str) -> None:
        query = torch.randn(0, 4, device=device, requires_grad=True)
        index = torch.zeros(0, 3, dtype=torch.int64, device=device)
        loss = partition_nce(
            query, torch.randn(5, 4, device=device), index, index, scale=1.0, log_partition=0.0, backend=backend
        )  # fmt: skip
        loss.backward()
        assert not loss.detach().any() and query.grad is not None and query.grad.shape == (0, 4)

    def test_a_row_without_a_positive_contributes_nothing(self, backend: str, device: str) -> None:
        """Not even where its query, its negatives or what its masked positives point at is NaN."""
        arguments = make_inputs(Shape(4, 30, 5, 2, 6), device=device)
        arguments["positive_index"] = torch.arange(8, device=device).view(4, 2)
        arguments["negative_index"] = torch.arange(6, 30, device=device).view(4, 6)
        arguments["negative_index"][0, 0] = 7
        with torch.no_grad():
            arguments["query"][3] = math.nan
            arguments["bank"][24:] = math.nan
            arguments["bank"][6] = math.inf
        call = partial(partition_nce, backend=backend)
        mask = torch.arange(4, device=device)[:, None].expand(4, 2) < 3
        found = value_and_gradients(call, arguments | {"positive_mask": mask})
        three = {name: arguments[name][:3] for name in ("positive_index", "negative_index")}
        three["query"] = arguments["query"].detach()[:3].requires_grad_()
        without = value_and_gradients(call, arguments | three)
        torch.testing.assert_close(found["output 0"], without["output 0"], rtol=1e-6, atol=0)
        torch.testing.assert_close(found["d scale"], without["d scale"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["d query"][:3], without["d query"], rtol=1e-5, atol=1e-6)
        assert not found["d query"][3].any()

    def test_leaving_out_a_row_by_mask_or_by_hand(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device)
        mask = torch.ones(7, 3, dtype=torch.bool, device=device)
        mask[5] = False
        mask[:, 2] = False
        by_mask = value_and_gradients(
            partial(partition_nce, backend=backend), {**arguments, "positive_mask": mask}
        )
        kept = [0, 1, 2, 3, 4, 6]
        by_hand = value_and_gradients(
            partial(partition_nce, backend=backend),
            {
                **arguments,
                "query": arguments["query"].detach()[kept].requires_grad_(),
                "positive_index": arguments["positive_index"][kept, :2],
                "negative_index": arguments["negative_index"][kept],
            },
        )
        torch.testing.assert_close(by_mask["output 0"], by_hand["output 0"], rtol=1e-5, atol=0)
        torch.testing.assert_close(by_mask["d query"][kept], by_hand["d query"], rtol=1e-4, atol=1e-6)

    def test_everything_masked(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device, masked=True)
        arguments["positive_mask"] = torch.zeros_like(arguments["positive_mask"])
        found = value_and_gradients(partial(partition_nce, backend=backend), arguments)
        assert all(not value.any() for value in found.values())

    def test_nan_reaches_the_output(self, backend: str, device: str) -> None:
        for where in ("query", "bank", "scale"):
            arguments = make_inputs(Shape(3, 4, 5, 2, 64), device=device)
            with torch.no_grad():
                arguments[where].view(-1)[0] = math.nan
            found = value_and_gradients(partial(partition_nce, backend=backend), arguments)
            assert all(value.isnan().any() for value in found.values()), where
        arguments = make_inputs(SHAPES["tiny"], device=device) | {"log_partition": math.nan}
        assert partition_nce(**arguments, backend=backend).isnan()

    def test_the_same_row_many_times(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device)
        arguments["positive_index"] = torch.full((3, 4), 2, device=device)
        arguments["negative_index"] = torch.full((3, 9), 2, device=device)
        judge(backend, torch.float32, arguments)

    def test_strided_and_expanded_inputs(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["ragged"], device=device, masked=True)
        strided = dict(arguments)
        for name in ("query", "positive_index", "negative_index", "positive_mask"):
            strided[name] = arguments[name].detach().T.contiguous().T
        for bank in (
            arguments["bank"].T.contiguous().T,
            torch.cat([arguments["bank"], arguments["bank"]], 1)[:, :19],
        ):
            assert not bank.is_contiguous()
            found = partition_nce(**{**strided, "bank": bank}, backend=backend)
            torch.testing.assert_close(
                found, partition_nce(**arguments, backend=backend).detach(), rtol=1e-6, atol=0
            )
        one = arguments["bank"][:1]
        given = {k: v for k, v in arguments.items() if k != "bank"}
        torch.testing.assert_close(
            partition_nce(**given, bank=one.expand(29, -1), backend=backend),
            partition_nce(**given, bank=one.repeat(29, 1), backend=backend),
            rtol=1e-6,
            atol=0,
        )

    def test_a_tensor_is_as_good_as_a_number(self, backend: str, device: str) -> None:
        arguments = make_inputs(SHAPES["tiny"], device=device)
        tensor = torch.tensor(arguments["log_partition"], device=device)
        found = partition_nce(**{**arguments, "log_partition": tensor}, backend=backend)
        torch.testing.assert_close(found, partition_nce(**arguments, backend=backend), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
class TestProperties:
    sizes = st.integers(1, 12)

    @given(queries=sizes, positives=sizes, negatives=sizes, seed=sizes)
    def test_order_does_not_matter(
        self, backend: str, queries: int, positives: int, negatives: int, seed: int
    ) -> None:
        arguments = make_inputs(Shape(queries, 20, 6, positives, negatives), masked=True, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        rows, columns, others = (
            torch.randperm(length, generator=generator) for length in (queries, positives, negatives)
        )
        permuted = arguments | {
            "query": arguments["query"][rows],
            "positive_index": arguments["positive_index"][rows][:, columns],
            "positive_mask": arguments["positive_mask"][rows][:, columns],
            "negative_index": arguments["negative_index"][rows][:, others],
        }
        torch.testing.assert_close(
            partition_nce(**permuted, backend=backend),
            partition_nce(**arguments, backend=backend),
            rtol=2e-5,
            atol=2e-5,
        )

    @given(queries=sizes, negatives=sizes, shift=st.floats(-30, 30))
    def test_shifting_scores_and_constant_together(
        self, backend: str, queries: int, negatives: int, shift: float
    ) -> None:
        generator = torch.Generator().manual_seed(queries)
        positive = torch.randn(queries, 2, generator=generator, dtype=torch.float64)
        negative = torch.randn(queries, negatives, generator=generator, dtype=torch.float64)
        call = partial(partition_nce, scale=1.0, backend=backend)
        torch.testing.assert_close(
            call(**scored(positive + shift, negative + shift), log_partition=1.5 + shift),
            call(**scored(positive, negative), log_partition=1.5),
            rtol=1e-9,
            atol=1e-9,
        )


class TestNoiseLogPartition:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_formula_in_any_chunks(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = make_inputs(SHAPES["ragged"], dtype=dtype)
        query, bank, index = (arguments[k] for k in ("query", "bank", "negative_index"))
        scores = 5.0 * (query.double()[:, None] * bank.double()[index]).sum(2)
        exact = scores.exp().mean().log()
        for elements in (1 << 23, 19 * 50, 19 * 10, 1):
            monkeypatch.setattr(op, "GATHERED_ELEMENTS", elements)
            found = noise_log_partition(query, bank, index, scale=5.0)
            assert not found.requires_grad
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(found.double(), exact.detach(), rtol=1e-5, atol=1e-5)

    def test_scores_of_hundreds(self) -> None:
        """exp of them would overflow."""
        query, bank = torch.tensor([[1.0]]), torch.tensor([[500.0], [498.0]])
        found = noise_log_partition(query, bank, torch.tensor([[0, 1]]), scale=1.0)
        assert float(found) == pytest.approx(500 + math.log((1 + math.exp(-2)) / 2), rel=1e-6)


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
def test_a_bank_of_more_elements_than_32_bits_count() -> None:
    bank = torch.zeros(20_000_000, 128, dtype=torch.bfloat16, device="cuda")
    bank[-1] = 1.0
    query = torch.ones(1, 128, dtype=torch.bfloat16, device="cuda")
    index = torch.tensor([[19_999_999]], device="cuda")
    loss = partition_nce(query, bank, index, index - 1, scale=1.0, log_partition=0.0, backend="triton")
    assert float(loss) == pytest.approx(0.6931472, rel=1e-5)


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


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_a_gradient_is_prepared_only_where_one_is_wanted(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[bool] = []
    real = torch.ops.jrl.partition_nce_forward

    def record(*arguments: Any) -> Any:
        prepared.append(arguments[-2])
        return real(*arguments)

    monkeypatch.setattr(torch.ops.jrl, "partition_nce_forward", record)
    arguments = make_inputs(SHAPES["tiny"], device=device)
    partition_nce(**arguments, backend=backend)
    alone = {"query": arguments["query"].detach(), "scale": 1.0}
    partition_nce(**arguments | alone, backend=backend)
    assert prepared == [True, False]
