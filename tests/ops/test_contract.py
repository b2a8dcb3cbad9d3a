"""What every op owes besides its values: registration, compilation, autocast, determinism, refusals of second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.conformance import BACKENDS, FUSED, leaves, value_and_gradients
from tests.ops.contracts import CONTRACTS, Call, Contract


def each(calls: Callable[[Contract], Any]) -> list[Any]:
    """One parameter for each call of each op, or for each call and what goes with it."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=f"{op} {(case[0] if isinstance(case, tuple) else case).name}",
        )
        for op, contract in CONTRACTS.items()
        for case in calls(contract)
    ]


def detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize(
    ("call", "operators"), each(lambda contract: [(call, contract.operators) for call in contract.small])
)
def test_opcheck(
    backend: str, device: str, call: Call, operators: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own checks of schema, fake tensors, autograd registration and AOT dispatch, on the call that the op makes."""
    made: list[tuple[Any, tuple[Any, ...]]] = []
    for name in operators:
        real = getattr(torch.ops.jrl, name)

        def record(*arguments: Any, real: Any = real) -> Any:
            made.append((real.default, arguments))
            return real(*arguments)

        monkeypatch.setattr(torch.ops.jrl, name, record)
    call.on(backend)(**call.make(device=device))
    monkeypatch.undo()
    assert len(made) == 1
    operator, arguments = made[0]
    torch.library.opcheck(operator, tuple(detached(value) for value in arguments))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("call", each(lambda contract: contract.compiled))
def test_compiles_whole(backend: str, device: str, call: Call) -> None:
    torch._dynamo.reset()
    arguments, eager = call.make(device=device), call.on(backend)
    graph = torch.compile(eager, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    if leaves(arguments):
        torch.testing.assert_close(
            value_and_gradients(graph, arguments), value_and_gradients(eager, arguments)
        )
    else:
        torch.testing.assert_close(graph(**arguments), eager(**arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("call", each(lambda contract: contract.captured))
def test_cuda_graph(call: Call) -> None:
    """A captured step replays on new numbers: nothing in it reads the GPU's memory on the host."""
    arguments, step = call.make(device="cuda", dtype=torch.bfloat16), call.on("triton")
    inputs = list(leaves(arguments).values())
    upstream = torch.randn_like(step(**arguments))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(step(**arguments), inputs, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(**arguments)
        gradients = torch.autograd.grad(output, inputs, upstream)
    with torch.no_grad():
        inputs[0].copy_(inputs[0].flip(0))
    graph.replay()
    expected = step(**arguments)
    torch.testing.assert_close(output, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize("call", each(lambda contract: contract.repeated))
def test_same_bits_twice(backend: str, device: str, call: Call) -> None:
    arguments = call.make(device=device)
    first, second = (value_and_gradients(call.on(backend), arguments) for _ in range(2))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("backend", "device"), FUSED)
@pytest.mark.parametrize(
    ("call", "leaf", "operators"),
    each(lambda contract: [(*case, contract.operators) for case in contract.refused]),
)
def test_fused_backward_has_no_derivative(
    backend: str, device: str, call: Call, leaf: str, operators: tuple[str, ...]
) -> None:
    arguments = call.make(device=device)
    output = call.on(backend)(**arguments)
    (gradient,) = torch.autograd.grad(output.square().sum(), arguments[leaf], create_graph=True)
    names = "|".join(name.removesuffix("_forward") for name in operators)
    with pytest.raises(NotImplementedError, match=f"^({names}): .*backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(("call", "names"), each(lambda contract: contract.twice))
def test_reference_has_a_second_derivative(call: Call, names: tuple[str, ...]) -> None:
    arguments = call.make(dtype=torch.float64)

    def loss(*tensors: Tensor) -> Any:
        return call.on("reference")(**arguments | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradgradcheck(loss, tuple(arguments[name] for name in names))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestAutocast:
    @pytest.mark.parametrize(
        ("call", "names", "result"),
        each(lambda contract: [(*case, contract.autocast_result) for case in contract.autocast]),
    )
    def test_operands_are_cast_and_logits_are_not(
        self, backend: str, device: str, call: Call, names: tuple[str, ...], result: torch.dtype
    ) -> None:
        arguments, function = call.make(device=device), call.on(backend)
        half = {k: v.detach().bfloat16() if k in names else v for k, v in arguments.items()}
        expected = function(**half)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = function(**arguments)
        assert found.dtype == result
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        found.sum().backward()
        for name, leaf in leaves(arguments).items():
            assert leaf.grad is not None and leaf.grad.dtype == torch.float32, name

    @pytest.mark.parametrize(
        ("call", "names"), each(lambda contract: [case for case in contract.autocast if len(case[1]) > 1])
    )
    def test_mixed_dtypes_meet_under_autocast(
        self, backend: str, device: str, call: Call, names: tuple[str, ...]
    ) -> None:
        arguments = call.make(device=device)
        arguments[names[1]] = arguments[names[1]].detach().bfloat16()
        with torch.autocast(device, dtype=torch.bfloat16):
            assert call.on(backend)(**arguments).isfinite().all()
