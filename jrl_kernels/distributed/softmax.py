"""Softmax losses of this rank's rows and of this rank's columns, over the rows and columns of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import without_autocast
from .._positives import Positives
from ..ops.info_nce.autograd import backward as operator_backward
from .carriers import Carrier
from .positives import RankPositives
from .states import merged, placed


class Settings(NamedTuple):
    """What a loss is over, besides the tensors with gradients."""

    carrier: Carrier
    positives: RankPositives
    exclude: tuple[Tensor | None, ...]  # ids of this rank's rows, of its columns and of the negatives
    direction: str
    multi_positive: str
    details: bool
    backend: str

    @property
    def rows(self) -> bool:
        return self.direction != "y_to_x"

    @property
    def columns(self) -> bool:
        return self.direction != "x_to_y"

    @property
    def merge(self) -> Callable[[Any], Tensor]:
        return partial(merged, multi_positive=self.multi_positive)

    def options(self, direction: str) -> tuple[Any, ...]:
        """The operator's."""
        return direction, self.multi_positive, self.details, self.backend

    def travellers(self, y: Tensor | None) -> list[Tensor | None]:
        """What a computation needs of each column."""
        return [y, self.positives.listed.y_ids, self.exclude[1]]

    def block(
        self, x: Tensor | None, scores: Tensor | None, scale: Tensor, columns: slice, *held: Tensor
    ) -> tuple[Any, ...]:
        """The operator's inputs for this rank's rows and a block of columns that `held` describes."""
        left = iter(held)
        y, y_ids, exclude = (
            None if part is None else next(left) for part in self.travellers(None if x is None else x)
        )
        which = self.positives.within(columns, self.carrier.ranks.total, y_ids)
        return x, y, scores, scale, None, *which, self.exclude[0], exclude, None

    def queue(self, x: Tensor, scale: Tensor, negatives: Tensor) -> tuple[Any, ...]:
        """The operator's inputs for this rank's rows and its queue, which is one more block of columns, after all others."""
        nothing = torch.empty(0, dtype=torch.int64, device=x.device)
        exclude = self.exclude[0], None if self.exclude[0] is None else nothing, self.exclude[2]
        return x, x[:0], None, scale, negatives, *Positives(rows=nothing, columns=nothing), *exclude


class Losses(torch.autograd.Function):
    """(x, y, scores, scale, negatives, settings) -> losses of this rank's rows [b] and columns [c], and their states [8, ...].

    The operators of `jrl_kernels.info_nce` compute rectangles, this rank's rows with a block of columns at a time. A row's sums
    over the blocks are merged here, a column's sums over the ranks' rows on their way (see `carriers`). The backward knows the
    sums over everything, so each rectangle's gradient is exact by itself, and gradients add up in float32.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        x, y, scores, scale, negatives, settings = arguments
        carrier, merge = settings.carrier, settings.merge
        forward = torch.ops.jrl.info_nce_forward
        states: list[Tensor] = []  # of the rows
        pairs: list[Tensor] = []  # logits of the listed positives of each block

        def compute(columns: slice, *held: Tensor) -> Tensor | None:
            inputs = settings.block(x, scores, scale, columns, *held)
            _, _, rows, of_columns, logits = forward(*inputs, *settings.options(settings.direction))
            pairs.append(logits)
            if settings.rows:
                states[:] = [merge([*states, placed(rows, columns.start)])]
            return placed(of_columns, carrier.ranks.rank) if settings.columns else None

        brought = carrier.bring(*(part for part in settings.travellers(y) if part is not None))
        found = carrier.visit(brought, compute, merge)
        if negatives is not None and settings.rows:
            _, _, rows, _, _ = forward(*settings.queue(x, scale, negatives), *settings.options("x_to_y"))
            states[:] = [merge([*states, placed(rows, carrier.ranks.total)])]
        outputs = [_finished(state, scale) for state in (states[0] if states else None, found)]
        (loss_x, state_x), (loss_y, state_y) = outputs
        ctx.settings, ctx.brought = settings, len(brought)
        ctx.save_for_backward(x, y, scores, scale, negatives, state_x, state_y, *brought, *pairs)
        ctx.mark_non_differentiable(state_x, state_y)
        return loss_x, loss_y, state_x, state_y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        settings: Settings = ctx.settings
        carrier = settings.carrier
        x, y, scores, scale, negatives, state_x, state_y, *others = ctx.saved_tensors
        brought, pairs = others[: ctx.brought], iter(others[ctx.brought :])
        wanted = [bool(need) for need in ctx.needs_input_grad[:4]]
        operator = without_autocast(operator_backward)
        total: list[Tensor | None] = [None] * 4

        def add(parts: tuple[Tensor | None, ...]) -> None:
            for place, part in enumerate(parts):
                if part is not None and place != 1:
                    before = total[place]
                    total[place] = part if before is None else before.add_(part)

        def compute(columns: slice, *held: Tensor) -> Tensor | None:
            state, grad = state_y, grad_y
            if settings.columns:
                *held, sums = held  # type: ignore[assignment]
                state, grad = sums[:, :3].T.contiguous(), sums[:, 3].contiguous()
            inputs = settings.block(x, scores, scale, columns, *held)
            parts = operator(
                grad_x, grad, *inputs, state_x, state, next(pairs), wanted, *settings.options(settings.direction)
            )  # fmt: skip
            add(parts)
            gradient: Tensor | None = parts[1] if wanted[1] else None
            return gradient

        sums = [torch.cat([state_y[:3].T, grad_y[:, None]], 1)] if settings.columns else []
        total[1] = carrier.visit([*brought, *carrier.bring(*sums)], compute)
        if negatives is not None and settings.rows and (wanted[0] or wanted[3]):
            none = state_y.new_empty(0)
            add(
                operator(
                    grad_x, none, *settings.queue(x, scale, negatives), state_x, none, none,
                    [wanted[0], False, False, wanted[3]], *settings.options("x_to_y"),
                )
            )  # fmt: skip
        gradients = [
            gradient.to(tensor.dtype) if want and gradient is not None else None
            for gradient, tensor, want in zip(total, (x, y, scores, scale), wanted, strict=True)
        ]
        return (*gradients, None, None)


def _finished(state: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [n] and state [8, n] in the dtype of `like`; a row without a positive has loss 0."""
    if state is None:
        return like.new_empty(0), like.new_empty(8, 0)
    state = state.T
    loss = torch.where(state[2] > 0, state[0] - state[1], 0.0)
    return loss.to(like.dtype), state.to(like.dtype).contiguous()
