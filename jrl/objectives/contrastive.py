"""Contrastive losses with their learnable temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jrl_kernels import distributed, info_nce, sigmoid_contrastive

LOSS_KINDS = ("info_nce", "sigmoid")


class ContrastiveObjective(nn.Module):
    """A contrastive loss over x·yᵀ·scale with a learnable scale = exp(t), at most max_scale.

    "info_nce" is CLIP's loss (t starts at log 1/0.07), "sigmoid" is SigLIP's (t starts at log 10; a learnable
    bias that starts at −10). A step that takes t above log max_scale is taken back at the next use; t keeps its
    gradient there, so it can come down again.

    Under torch.distributed with several ranks the loss is that of all their batches together
    (`jrl_kernels.distributed`), for gradients that are averaged over the ranks, as DDP and FSDP do; every rank must then call it.

    Args:
        loss: "info_nce" or "sigmoid".
        init_scale: first value of exp(t); 1/0.07 for "info_nce" and 10 for "sigmoid" when None.
        init_bias: first value of the bias; −10 for "sigmoid" and no bias for "info_nce" when None.
        max_scale: upper bound of the scale; None for none.
        learnable: whether t (and the bias) are parameters or buffers.
        direction: "both", "x_to_y" or "y_to_x" ("info_nce" only).
        multi_positive: "mean" or "sum": how several positives of one row combine ("info_nce" only).
        backend: of the kernel; "auto" takes the fastest.
        form: across ranks, "gather" or "ring" (for batches whose gathered embeddings would not fit).

    Raises:
        ValueError: a value outside those named, or an option that the chosen loss does not have.
    """

    log_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        loss: str = "info_nce",
        *,
        init_scale: float | None = None,
        init_bias: float | None = None,
        max_scale: float | None = 100.0,
        learnable: bool = True,
        direction: str = "both",
        multi_positive: str = "mean",
        backend: str = "auto",
        form: str = "gather",
    ) -> None:
        super().__init__()
        if loss not in LOSS_KINDS:
            raise ValueError(f"loss: expected one of {', '.join(LOSS_KINDS)}, got {loss!r}")
        if direction not in ("both", "x_to_y", "y_to_x"):
            raise ValueError(f"direction: expected 'both', 'x_to_y' or 'y_to_x', got {direction!r}")
        if multi_positive not in ("mean", "sum"):
            raise ValueError(f"multi_positive: expected 'mean' or 'sum', got {multi_positive!r}")
        if form not in ("gather", "ring"):
            raise ValueError(f"form: expected 'gather' or 'ring', got {form!r}")
        if loss == "sigmoid" and (direction != "both" or multi_positive != "mean"):
            raise ValueError(
                "direction, multi_positive: the sigmoid loss judges every pair alone and has neither"
            )
        if max_scale is not None and not max_scale > 0:
            raise ValueError(f"max_scale: expected a positive number or None, got {max_scale}")
        if init_scale is None:
            init_scale = 1 / 0.07 if loss == "info_nce" else 10.0
        if not (init_scale > 0 and math.isfinite(init_scale)):
            raise ValueError(f"init_scale: expected a positive finite number, got {init_scale}")
        if init_bias is None and loss == "sigmoid":
            init_bias = -10.0
        self.loss, self.direction, self.multi_positive, self.backend = (
            loss,
            direction,
            multi_positive,
            backend,
        )
        self.max_scale, self.learnable, self.form = max_scale, learnable, form
        self._config = {"init_scale": init_scale, "init_bias": init_bias}
        self._register("log_scale", math.log(init_scale))
        if init_bias is None:
            self.bias = None
        else:
            self._register("bias", init_bias)

    @property
    def scale(self) -> Tensor:
        """exp(t), 0-d, with its gradient, once t has been brought back to log max_scale."""
        if self.max_scale is not None:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.exp()

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        positives: Tensor | tuple[Tensor, Tensor] | None = None,
        negatives: Tensor | None = None,
        exclude: Tensor | tuple[Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of [M, D] against [N, D].

        Args:
            x, y: [M, D], [N, D], of unit length for a cosine.
            positives: see `jrl_kernels.info_nce`; row i with row i when None. Across ranks an index is a row of this rank's y
                too, ids are compared with those of all ranks, and a sparse matrix is [M, all ranks' rows of y].
            negatives: [Q, D] further keys without gradient.
            exclude: ids whose equal pairs are no negatives.
            weights: [M] weights of the rows; across ranks only without `positives`.

        Returns:
            The 0-d loss, and detached 0-d statistics: the scale, and for "info_nce" top-1 accuracy, entropy
            and the bound log N − loss (nats) of each direction.

        Raises:
            TypeError, ValueError: as the op, on every rank; ValueError also for M ≠ N without `positives` and for what the
                sigmoid loss does not have.
        """
        with distributed.raise_together(x, y):
            if positives is None and len(x) != len(y):
                raise ValueError(
                    f"x, y: expected the same number of rows without positives, got {len(x)} and {len(y)}"
                )
            given = {"negatives": negatives, "exclude": exclude, "weights": weights}
            refused = [name for name, value in given.items() if value is not None]
            if self.loss == "sigmoid" and refused:
                raise ValueError(f"{', '.join(refused)}: the sigmoid loss does not take it")
            if several_ranks():
                positives = _named_by_id(positives, y)
        scale = self.scale
        if self.loss == "sigmoid":
            loss = self._across_ranks(distributed.sigmoid_contrastive, sigmoid_contrastive)(
                x,
                y,
                scale=scale,
                bias=0.0 if self.bias is None else self.bias,
                positives=positives,
                backend=self.backend,
            )
            return loss, {"scale": scale.detach()}
        loss, stats = self._across_ranks(distributed.info_nce, info_nce)(
            x,
            y,
            scale=scale,
            bias=self.bias,
            positives=positives,
            negatives=negatives,
            exclude=exclude,
            direction=self.direction,
            multi_positive=self.multi_positive,
            weights=weights,
            return_stats=True,
            backend=self.backend,
        )
        return loss, {"scale": scale.detach(), **self._named(stats)}

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this objective again, in JSON types."""
        return {
            "loss": self.loss,
            **self._config,
            "max_scale": self.max_scale,
            "learnable": self.learnable,
            "direction": self.direction,
            "multi_positive": self.multi_positive,
            "backend": self.backend,
            "form": self.form,
        }

    def _across_ranks(self, several: Callable[..., Any], one: Callable[..., Any]) -> Callable[..., Any]:
        return partial(several, form=self.form) if several_ranks() else one

    def _named(self, stats: Any) -> dict[str, Tensor]:
        sides = ("x_to_y", "y_to_x") if self.direction == "both" else (self.direction,)
        return {
            f"{kind}_{side}": getattr(stats, f"{kind}_{side}")
            for kind in ("accuracy", "entropy", "bound")
            for side in sides
        }

    def _register(self, name: str, value: float) -> None:
        tensor = torch.tensor(value)
        if self.learnable:
            setattr(self, name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _named_by_id(positives: Any, y: Tensor) -> Any:
    """An index of this rank's rows of y as ids, which mean the same on every rank; other positives as they are."""
    index = isinstance(positives, Tensor) and positives.layout == torch.strided
    if not index or positives.dtype != torch.int64 or positives.ndim != 1:
        return positives
    # looking at a value would stall an accelerator, which checks an index by itself
    if positives.device.type == "cpu" and not bool(((positives >= 0) & (positives < len(y))).all()):
        raise ValueError(f"positives: expected rows of y in [0, {len(y)}), got {positives.tolist()}")
    own = row_ids(len(y), y.device, across_ranks=True)
    return own[positives], own


def row_ids(rows: int, device: torch.device, across_ranks: bool) -> Tensor:
    """An int64 id for each of this rank's rows, which no row of another rank has."""
    first = torch.distributed.get_rank() << 32 if across_ranks else 0
    return torch.arange(first, first + rows, device=device)


def duplicate_text_ids(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """One id for each distinct text of a batch, for `positives` and `exclude`.

    A 64-bit hash of the real tokens and their order, so the same text gets the same id in every batch
    and on every rank, whatever its padding. Distinct texts collide with probability about C²/2⁶⁵ in a batch
    of C.

    Args:
        input_ids: [C, L] int64 token ids.
        attention_mask: [C, L], nonzero where a token is real; None when all are.

    Returns:
        [C] int64.

    Raises:
        TypeError: `input_ids` is not an integer tensor.
        ValueError: shapes do not fit.
    """
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids: expected int64, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected [C, L], got {list(input_ids.shape)}")
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if real.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected {list(input_ids.shape)} as input_ids, got {list(real.shape)}"
        )
    # the rank among the real tokens, not the column: left and right padding then agree
    position = real.long().cumsum(dim=1)
    mixed = _mix(input_ids.long() + _mix(position))
    return _mix(mixed.masked_fill(~real, 0).sum(dim=1) + real.sum(dim=1))


def _mix(x: Tensor) -> Tensor:
    # the finaliser of splitmix64 in wrapping int64 arithmetic; >> is arithmetic, hence the masks
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
