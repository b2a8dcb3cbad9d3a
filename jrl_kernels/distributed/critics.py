"""Scores of this rank's images with all ranks' captions, by the critics over regions and words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ..ops.max_sim import max_sim as local_max_sim
from ..ops.word_region import word_region_scores as local_word_region_scores
from .agreement import raise_together
from .carriers import FORMS, Ring
from .ranks import Ranks, gather_rows

OPERANDS = ("regions", "region_values", "words", "word_values")


def max_sim(
    regions: Tensor,
    words: Tensor,
    *,
    word_mask: Tensor | None = None,
    form: str = "gather",
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """`jrl_kernels.max_sim` of this rank's images with the captions of all ranks, for `info_nce_from_scores` of this module.

    Args:
        regions: [b, R, D], this rank's.
        words: [b, T, D], this rank's; T may differ between ranks, but where regions search words with mask_mode="zero": there
            a masked word has similarity 0, and so would padding to the longest.
        word_mask: bool [b, T], True = valid; None = all.
        form: "gather" (every rank holds the words of all) or "ring" (they come by in blocks of one rank's captions, and come by
            again in the backward, which computes the scores a second time).
        group: the process group; the default one when None.
        options: as in `jrl_kernels.max_sim`.

    Returns:
        [b, C], C captions of all ranks in the order of ranks.

    Raises: as `jrl_kernels.max_sim` and `info_nce` of this module.

    Gradients: regions, words; what other ranks' scores say of this rank's words arrives in the backward.
    """
    own = {"regions": regions, **options}
    return _scores("distributed.max_sim", local_max_sim, own, words, None, word_mask, form, group)


def word_region_scores(
    regions: Tensor,
    words: Tensor,
    *,
    word_values: Tensor | None = None,
    word_mask: Tensor | None = None,
    form: str = "gather",
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """`jrl_kernels.word_region_scores` of this rank's images with the captions of all ranks, for `info_nce_from_scores`.

    Args:
        regions: [b, R, D], this rank's.
        words: [b, T, D], this rank's; T may differ between ranks.
        word_values: [b, T, E]; None = the words.
        word_mask: bool [b, T], True = valid; None = all.
        form, group: as in `max_sim` of this module.
        options: as in `jrl_kernels.word_region_scores`; region_values and region_mask are this rank's.

    Returns, Raises, Gradients: as `max_sim` of this module; those of `jrl_kernels.word_region_scores` besides.
    """
    op = "distributed.word_region_scores"
    own = {"regions": regions, **options}
    return _scores(op, local_word_region_scores, own, words, word_values, word_mask, form, group)


def _scores(
    op: str,
    critic: Callable[..., Tensor],
    own: dict[str, Any],
    words: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    form: str,
    group: dist.ProcessGroup | None,
) -> Tensor:
    with raise_together(words, *own.values(), group=group):
        _checks.choice(op, "form", form, FORMS)
        sizes: dict[str, int] = {}
        _checks.shaped(op, "words", words, "b T D", sizes)
        if values is not None:
            _checks.shaped(op, "word_values", values, "b T E", sizes)
        if mask is not None:
            _checks.mask(op, "word_mask", mask, "b T", sizes, "words", words)
        captions = {"words": words} if values is None else {"words": words, "word_values": values}
        # of no captions a critic costs next to nothing, and checks everything else
        with torch.no_grad():
            critic(
                **own, **{name: tensor.new_empty(0, 1, tensor.shape[2]) for name, tensor in captions.items()}
            )
    learning = [
        name
        for name, value in (*captions.items(), *own.items())
        if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad
    ]
    # of this rank's own side, only whether there is a backward at all decides what other ranks wait for
    # where a masked word has similarity 0, padding to another rank's length would win over negative ones
    searched = own.get("mask_mode") == "zero" and own.get("direction", "words") != "words"
    agreed = (
        *(form, mask is None, *(name in learning for name in captions), bool(learning)),
        words.shape[1] if searched else None,
        None if values is None else (values.shape[2], values.dtype),
        sorted(
            (name, value)
            for name, value in own.items()
            if not isinstance(value, Tensor) and name != "region_mask"  # which a rank may well do without
        ),
    )
    # ranks pad their captions to lengths of their own: what they must agree in is the width and the dtype
    ranks = Ranks(op, words.new_empty(words.shape[0], words.shape[2]), agreed, group, even=False)
    lengths = ranks.stack(torch.tensor(words.shape[1], device=words.device)).tolist()
    longest = max(1, *lengths)  # a critic needs a word, be it of no caption
    if mask is None and min(lengths) < longest:
        mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
    missing = longest - words.shape[1]
    captions = {name: F.pad(tensor, (0, 0, 0, missing)) for name, tensor in captions.items()}
    mask = None if mask is None else F.pad(mask, (0, missing))
    if form == "gather":
        everybody = {name: gather_rows(tensor, ranks) for name, tensor in captions.items()}
        return critic(**own, **everybody, word_mask=None if mask is None else ranks.gather(mask))
    operands = {**own, **captions}
    for name in OPERANDS:
        if operands.get(name) is not None:
            operands[name] = _checks.autocast(operands[name])[0]
    settings = _Settings(critic, Ring(ranks), tuple(captions), tuple(n for n in learning if n in own))
    constant = {name: value for name, value in operands.items() if name not in (*captions, *settings.own)}
    tensors = (operands[name] for name in (*settings.captions, *settings.own))
    found: Tensor = _RingScores.apply(settings, constant, mask, *tensors)
    return found


class _Settings(NamedTuple):
    critic: Callable[..., Tensor]
    ring: Ring
    captions: tuple[str, ...]  # names of the arguments that travel
    own: tuple[str, ...]  # names of this rank's that have gradients


class _RingScores(torch.autograd.Function):
    """(settings, constant arguments, word mask, *captions, *own tensors) -> scores [b, C], or [b, C, ...] of single words."""

    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, constant: dict[str, Any], mask: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        count = len(settings.captions)
        own = {**constant, **dict(zip(settings.own, tensors[count:], strict=True))}
        pieces: dict[tuple[int, int], Tensor] = {}

        def compute(columns: slice, *block: Tensor) -> None:
            if columns.stop > columns.start:
                pieces[columns.start, columns.stop] = _of_block(settings, own, mask is not None, block)

        travelling = [*tensors[:count], *([] if mask is None else [mask.to(torch.uint8)])]
        brought = settings.ring.bring(*travelling)
        settings.ring.visit(brought, compute)
        if not pieces:  # no rank has a caption
            pieces[0, 0] = _of_block(settings, own, mask is not None, tuple(part[:0] for part in brought))
        ctx.settings, ctx.constant, ctx.masked = settings, constant, mask is not None
        ctx.save_for_backward(*tensors, *brought)
        return torch.cat([pieces[place] for place in sorted(pieces)], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        settings: _Settings = ctx.settings
        count = len(settings.captions)
        tensors = ctx.saved_tensors[: count + len(settings.own)]
        brought = ctx.saved_tensors[len(tensors) :]
        wanted = ctx.needs_input_grad[3:]
        own = [tensor.detach().requires_grad_() for tensor in tensors[count:]]
        totals: list[Tensor | None] = [None] * len(own)

        def compute(columns: slice, *block: Tensor) -> Tensor | None:
            leaves = [part.detach().requires_grad_() for part in block[:count]]
            found: list[Tensor | None] = [None] * len((*leaves, *own))
            if columns.stop > columns.start:
                arguments = {**ctx.constant, **dict(zip(settings.own, own, strict=True))}
                with torch.enable_grad():
                    scores = _of_block(settings, arguments, ctx.masked, (*leaves, *block[count:]))
                found = list(
                    torch.autograd.grad(scores, (*leaves, *own), grad[:, columns], allow_unused=True)
                )
            for place, part in enumerate(found[count:]):
                before = totals[place]
                if part is not None:
                    part = part.to(torch.promote_types(part.dtype, torch.float32))
                    totals[place] = part if before is None else before + part
            if not any(wanted[:count]):
                return None
            # one message for words and values: side by side in their last axis
            wide = torch.promote_types(leaves[0].dtype, torch.float32)
            parts = [
                torch.zeros_like(leaf) if part is None else part
                for leaf, part in zip(leaves, found, strict=False)
            ]
            return torch.cat([part.to(wide) for part in parts], -1)

        said = settings.ring.visit(brought, compute)
        of_captions: list[Tensor | None] = [None] * count
        if said is not None:
            of_captions = list(said.split([tensor.shape[-1] for tensor in tensors[:count]], -1))
        gradients = [
            gradient.to(tensor.dtype) if want and gradient is not None else None
            for want, gradient, tensor in zip(wanted, (*of_captions, *totals), tensors, strict=True)
        ]
        return (None, None, None, *gradients)


def _of_block(settings: _Settings, own: dict[str, Any], masked: bool, block: tuple[Tensor, ...]) -> Tensor:
    """Scores of this rank's images with the captions of one block."""
    captions = dict(zip(settings.captions, block, strict=False))
    with torch.autocast(block[0].device.type, enabled=False):
        return settings.critic(**own, **captions, word_mask=block[-1].bool() if masked else None)
