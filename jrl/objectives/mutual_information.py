"""The mutual-information estimator: lower bounds from a matrix of scores that some critic has made."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrl.objectives.contrastive import row_ids
from jrl_kernels import distributed, info_nce_from_scores

BOUNDS = ("nce", "jsd", "dv")
DIRECTIONS = {"both": "both", "image_to_text": "x_to_y", "text_to_image": "y_to_x"}
SATURATED = 0.9
# info-ground's code adds it to the number of words
_WORDS_EPS = 1e-6


class MutualInformationEstimator(nn.Module):
    """A lower bound I, in nats, of what pictures and captions say about each other; the loss is −I.

    For scores S [N, N] of every picture (rows) with every caption, own pairs on the diagonal::

        nce    log N + mean_n log softmax(S)_nn, over the captions of a picture ("image_to_text"), over the pictures
               of a caption ("text_to_image"), or the mean of both
        jsd    mean_n [log 2 − softplus(−S_nn)] − mean_{n≠m} [softplus(S_nm) − log 2]
        dv     mean_n S_nn − log mean_{n≠m} exp S_nm

    US 2021/0056353 A1, equation 2 (nce, "image_to_text": captions are contrasted); Hjelm et al. 2019 (jsd); Belghazi
    et al. 2018 (dv). For scores of every word, [N, N, T], nce in the direction "text_to_image" is info-ground's loss: each
    word picks its picture, the mean is taken over a caption's words, then over captions.

    nce cannot pass log N: near it the bound says only that the batch is too small to tell, and a warning says so once. Where
    pairs are left out, N is the number of candidates that are kept, and log N is the mean over rows, columns or captions.
    jsd and dv are no such bounds on a finite batch: jsd is one of a divergence, and dv overfits.

    Args:
        bound: "nce", "jsd" or "dv".
        direction: "both", "image_to_text" or "text_to_image" (nce only).
        backend: of the kernel; "auto" takes the fastest.

    Raises:
        ValueError: a value outside those named, or a direction for a bound that has none.
    """

    def __init__(self, bound: str = "nce", direction: str = "both", *, backend: str = "auto") -> None:
        super().__init__()
        if bound not in BOUNDS:
            raise ValueError(f"bound: expected one of {', '.join(BOUNDS)}, got {bound!r}")
        if direction not in DIRECTIONS:
            raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
        if bound != "nce" and direction != "both":
            raise ValueError(f"direction: the bound {bound!r} is symmetric and has none, got {direction!r}")
        self.bound, self.direction, self.backend = bound, direction, backend
        self._warned = False

    def forward(
        self,
        scores: Tensor,
        *,
        word_mask: Tensor | None = None,
        valid: Tensor | None = None,
        exclude: Tensor | None = None,
        across_ranks: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a matrix of scores.

        Args:
            scores: [N, N] float, or [N, N, T] of every word; row n and column n belong together.
            word_mask: [N, T] bool, true where a word is real; for scores of every word. A caption without words counts
                nothing.
            valid: [N] bool, for [N, N]: pairs that count, as those whose caption has words; the others are left out.
            exclude: [N] int64 ids; pairs n ≠ m with equal ids (the same caption twice) are no negatives (nce only).
            across_ranks: `scores` are those of `AttentionCritic` across ranks, [b, N] of this rank's pictures with the
                captions of all, or [N, b, T] of the pictures of all with this rank's captions; `word_mask` [b, T], `valid`
                and `exclude` [b] are this rank's. The bound is over the pairs of all ranks, with gradients made to be
                averaged over the ranks, which must all call it.

        Returns:
            −I, 0-d with its gradient, and detached 0-d "bound" I and, for nce, "ceiling" log N and "saturation"
            I / log N. 0 where fewer than two pairs are valid or no caption has words.

        Raises:
            TypeError: `scores` is not floating point.
            ValueError: shapes do not fit, fewer than two pairs for jsd and dv, or an option that the bound does not have.
        """
        with distributed.raise_together(scores, alone=not across_ranks):
            self._check(scores, word_mask, exclude, valid, across_ranks)
        if valid is not None:
            everywhere = distributed.gather(valid) if across_ranks else valid
            scores = scores[valid][:, everywhere]
            exclude = None if exclude is None else exclude[valid]
            if scores.shape[1] < min(2, len(everywhere)):
                return self._nothing(scores.sum())
        if self.bound != "nce":
            return self._divergence(scores, across_ranks)
        options: dict[str, Any] = {"direction": DIRECTIONS[self.direction], "backend": self.backend}
        if scores.ndim == 3:
            loss, ceiling = _word_loss(scores, word_mask, exclude, options, across_ranks)
        else:
            softmax = distributed.info_nce_from_scores if across_ranks else info_nce_from_scores
            loss = softmax(scores, exclude=None if exclude is None else (exclude, exclude), **options)
            ceiling = loss.new_tensor(math.log(scores.shape[1]))
            if exclude is not None:
                ceiling = _mean(_log_kept(exclude, across_ranks).to(loss), across_ranks)
        bound = ceiling - loss
        self._warn_of_saturation(bound.detach(), ceiling)
        saturation = bound.detach() / ceiling.clamp(min=torch.finfo(ceiling.dtype).tiny)
        return -bound, {"bound": bound.detach(), "ceiling": ceiling, "saturation": saturation}

    def _check(
        self,
        scores: Tensor,
        word_mask: Tensor | None,
        exclude: Tensor | None,
        valid: Tensor | None,
        across_ranks: bool,
    ) -> None:
        if not scores.is_floating_point():
            raise TypeError(f"scores: expected a floating dtype, got {scores.dtype}")
        square = across_ranks or (len(scores) and scores.shape[:1] == scores.shape[1:2])
        if scores.ndim not in (2, 3) or not square:
            raise ValueError(f"scores: expected [N, N] or [N, N, T], got {list(scores.shape)}")
        if (word_mask is not None) and scores.ndim == 2:
            raise ValueError(f"word_mask: needs scores of every word [N, N, T], got {list(scores.shape)}")
        if scores.ndim == 3 and (self.bound != "nce" or self.direction != "text_to_image"):
            raise ValueError(
                "scores: scores of every word [N, N, T] need bound 'nce' and direction 'text_to_image', "
                f"got {self.bound!r} and {self.direction!r}"
            )
        if scores.ndim == 3 and word_mask is not None:
            expected = scores.shape[1:]
            if word_mask.dtype != torch.bool or word_mask.shape != expected:
                raise ValueError(
                    f"word_mask: expected bool {list(expected)}, got {word_mask.dtype} {list(word_mask.shape)}"
                )
        if valid is not None and (
            scores.ndim == 3 or valid.dtype != torch.bool or valid.shape != scores.shape[:1]
        ):
            raise ValueError(
                f"valid: expected bool [{len(scores)}] for scores [N, N], got {valid.dtype} {list(valid.shape)}"
            )
        if self.bound != "nce" and exclude is not None:
            raise ValueError(f"exclude: the bound {self.bound!r} cannot leave pairs out")
        if self.bound != "nce" and scores.shape[1] < 2:
            raise ValueError(
                f"scores: the bound {self.bound!r} needs at least 2 pairs, got {scores.shape[1]}"
            )

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this estimator again, in JSON types."""
        return {"bound": self.bound, "direction": self.direction, "backend": self.backend}

    def _nothing(self, nothing: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What a batch without negatives says, with a graph to the scores."""
        nothing = 0.0 * nothing
        names = ("bound", "ceiling", "saturation") if self.bound == "nce" else ("bound",)
        return nothing, dict.fromkeys(names, nothing.detach())

    def _divergence(self, scores: Tensor, across_ranks: bool) -> tuple[Tensor, dict[str, Tensor]]:
        rows, count = scores.shape
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        mean = distributed.mean if across_ranks else torch.mean
        own = row_ids(rows, scores.device, across_ranks)
        same = own[:, None] == (distributed.gather(own) if across_ranks else own)
        with distributed.raise_together(scores, alone=not across_ranks):
            if same.shape != scores.shape:
                raise ValueError(f"scores: expected {list(same.shape)}, got {list(scores.shape)}")
        if self.bound == "jsd":
            # logsigmoid is exact where softplus turns linear
            others = F.logsigmoid(-scores).masked_fill(same, 0.0).sum(dim=1) / (count - 1)
            paired = F.logsigmoid(scores).masked_fill(~same, 0.0).sum(dim=1)
            bound = mean(paired + others) + 2 * math.log(2)
        else:
            others = scores.masked_fill(same, -math.inf).logsumexp(dim=1)
            largest = others.detach()
            largest = (distributed.gather(largest) if across_ranks else largest).max()
            paired = mean(scores.masked_fill(~same, 0.0).sum(dim=1))
            bound = paired - largest - mean((others - largest).exp()).log() + math.log(count - 1)
        return -bound, {"bound": bound.detach()}

    def _warn_of_saturation(self, bound: Tensor, ceiling: Tensor) -> None:
        # looking at a value would stall an accelerator
        if self._warned or bound.device.type != "cpu" or not ceiling:
            return
        if bound > SATURATED * ceiling:
            self._warned = True
            warnings.warn(
                f"the bound is {bound:.2f} nats of at most log {ceiling.exp():.0f} = {ceiling:.2f}: "
                "a larger batch is needed to see more",
                stacklevel=3,
            )


def _mean(values: Tensor, across_ranks: bool) -> Tensor:
    """The mean over the rows of all ranks; 0 without rows."""
    return distributed.mean(values) if across_ranks else values.sum() / max(1, len(values))


def _log_kept(exclude: Tensor, across_ranks: bool) -> Tensor:
    """log of how many candidates are left to each own pair: itself, and those with other ids."""
    everywhere = distributed.gather(exclude) if across_ranks else exclude
    others = (exclude[:, None] != everywhere).sum(dim=1)
    return (others + 1).double().log()


def _word_loss(
    scores: Tensor,
    word_mask: Tensor | None,
    exclude: Tensor | None,
    options: dict[str, Any],
    across_ranks: bool,
) -> tuple[Tensor, Tensor]:
    """− mean over captions of the mean over words of log softmax over the pictures, at the caption's own picture; its ceiling."""
    pictures, captions, words = scores.shape
    if word_mask is None:
        word_mask = torch.ones(captions, words, dtype=torch.bool, device=scores.device)

    def both(own: Tensor) -> tuple[Tensor, Tensor]:
        """Of the pictures, and of every word of this rank's captions."""
        return distributed.gather(own) if across_ranks else own, own.repeat_interleave(words)

    options["positives"] = both(row_ids(captions, scores.device, across_ranks))
    options["exclude"] = None if exclude is None else both(exclude)
    # each word has all its candidates here, so nothing but the mean is left to the other ranks
    with distributed.raise_together(scores, alone=not across_ranks):
        losses = info_nce_from_scores(scores.flatten(1), reduction="none", **options)
    losses = losses.unflatten(0, (captions, words))
    total = losses.masked_fill(~word_mask, 0.0).sum(dim=1)
    each = total / (word_mask.sum(dim=1).to(total.dtype) + _WORDS_EPS)
    spoken = word_mask.any(dim=1)
    ceilings = torch.full_like(each, math.log(pictures))
    if exclude is not None:
        ceilings = _log_kept(exclude, across_ranks).to(each)
    return _mean(each[spoken], across_ranks), _mean(ceilings[spoken], across_ranks)
