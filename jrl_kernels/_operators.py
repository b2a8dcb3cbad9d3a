"""Registering a differentiable operator: torch.ops.jrl.<name>_forward, its backward, their fakes and their autograd."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import without_autocast

LIBRARY = torch.library.Library("jrl", "FRAGMENT")


def register(
    name: str,
    *,
    inputs: str,
    options: str,
    outputs: Sequence[str],
    gradients: Sequence[str],
    forward: Callable[..., Tensor | tuple[Tensor, ...]],
    fake: Callable[..., Tensor | tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    differentiable: int = 1,
) -> None:
    """Define `name`_forward and `name`_backward in torch.ops.jrl and connect them.

    Args:
        name: the operator's name, which its messages use too.
        inputs: schema of the tensors, "Tensor x, Tensor? mask".
        options: schema of what follows them, "bool hard, str backend"; at least one.
        outputs: names of the outputs. The first `differentiable` of them carry gradients, the rest are saved for the backward.
        gradients: names of the inputs that `backward` differentiates.
        forward: (*inputs, *options) -> outputs, new tensors.
        fake: the same on fake tensors: shapes and dtypes alone.
        backward: (*output gradients, *inputs, *saved outputs, wanted, *options) -> a gradient (or None) for each of `gradients`,
            cast here to its input's dtype; `wanted` is a list of bools in the same order.
        differentiable: how many of the outputs carry gradients.

    A derivative of the backward is refused: it would be wrong to return anything.
    """
    named = [re.split(r"\s+", part.strip())[-1] for part in inputs.split(",")]
    differentiated = [named.index(gradient) for gradient in gradients]
    saved = list(outputs[differentiable:])
    returned = ", ".join(f"Tensor {output}" for output in outputs)
    LIBRARY.define(f"{name}_forward({inputs}, {options}) -> ({returned})")
    upstream = ", ".join(f"Tensor grad_{output}" for output in outputs[:differentiable])
    kept = "".join(f", Tensor {output}" for output in saved)
    found = ", ".join("Tensor" for _ in gradients)
    LIBRARY.define(f"{name}_backward({upstream}, {inputs}{kept}, bool[] wanted, {options}) -> ({found})")
    first_input = differentiable
    wanted_at = differentiable + len(named) + len(saved)

    def nothing(arguments: Sequence[Any]) -> Tensor:
        return torch.empty(0, dtype=arguments[0].dtype, device=arguments[0].device)

    def run_backward(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        wanted = arguments[wanted_at]
        results = []
        for at, flag, gradient in zip(differentiated, wanted, backward(*arguments), strict=True):
            like = arguments[first_input + at]
            use = flag and gradient is not None and like is not None
            results.append(gradient.to(like.dtype).contiguous() if use else nothing(arguments))  # type: ignore[union-attr]
        return results[0] if len(results) == 1 else tuple(results)

    def fake_backward(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        wanted = arguments[wanted_at]
        results = []
        for at, flag in zip(differentiated, wanted, strict=True):
            like = arguments[first_input + at]
            shaped = flag and like is not None
            results.append(
                torch.empty(like.shape, dtype=like.dtype, device=like.device)
                if shaped
                else nothing(arguments)
            )
        return results[0] if len(results) == 1 else tuple(results)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        produced = output if isinstance(output, tuple) else (output,)
        ctx.options = inputs[len(named) :]
        ctx.save_for_backward(*inputs[: len(named)], *produced[differentiable:])
        if saved:
            ctx.mark_non_differentiable(*produced[differentiable:])

    def differentiate(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        wanted = [needs[at] for at in differentiated]
        operator = getattr(torch.ops.jrl, f"{name}_backward")
        found = operator(*output_gradients[:differentiable], *ctx.saved_tensors, wanted, *ctx.options)
        results: list[Tensor | None] = [None] * len(needs)
        for at, flag, gradient in zip(
            differentiated, wanted, found if isinstance(found, (tuple, list)) else (found,), strict=True
        ):
            results[at] = gradient if flag else None
        return tuple(results)

    def refuse(ctx: Any, *unused: Any) -> Any:
        raise NotImplementedError(
            f"{name}: its fused backward has no derivative; use backend='reference' where a second derivative is needed"
        )

    LIBRARY.impl(f"{name}_forward", without_autocast(forward), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_backward", without_autocast(run_backward), "CompositeExplicitAutograd")
    torch.library.register_fake(f"jrl::{name}_forward", fake, lib=LIBRARY)
    torch.library.register_fake(f"jrl::{name}_backward", fake_backward, lib=LIBRARY)
    torch.library.register_autograd(
        f"jrl::{name}_forward", differentiate, setup_context=setup_context, lib=LIBRARY
    )
    torch.library.register_autograd(f"jrl::{name}_backward", refuse, lib=LIBRARY)
