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

    nce cannot pass log N: near it the bound says only that the batch is too small to tell, and a warning says so once.
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
        exclude: Tensor | None = None,
        across_ranks: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a matrix of scores.

        Args:
            scores: [N, N] float, or [N, N, T] of every word; row n and column n belong together.
            word_mask: [N, T] bool, true where a word is real; for scores of every word.
            exclude: [N] int64 ids; pairs n ≠ m with equal ids (the same caption twice) are no negatives (nce only).
            across_ranks: `scores` are those of `AttentionCritic` across ranks, [b, N] of this rank's pictures with the
                captions of all, or [N, b, T] of the pictures of all with this rank's captions; `word_mask` [b, T] and
                `exclude` [b] are this rank's. The bound is over the pairs of all ranks, with gradients made to be
                averaged over the ranks, which must all call it.

        Returns:
            −I, 0-d with its gradient, and detached 0-d "bound" I and, for nce, "ceiling" log N and "saturation"
            I / log N.

        Raises:
            TypeError: `scores` is not floating point.
            ValueError: shapes do not fit, fewer than two pairs for jsd and dv, or an option that the bound does not have.
        """
        with distributed.raise_together(scores, alone=not across_ranks):
            self._check(scores, word_mask, exclude, across_ranks)
        if self.bound != "nce":
            return self._divergence(scores, across_ranks)
        options: dict[str, Any] = {"direction": DIRECTIONS[self.direction], "backend": self.backend}
        pairs = scores.shape[0] if scores.ndim == 3 else scores.shape[1]
        if scores.ndim == 3:
            loss = _word_loss(scores, word_mask, exclude, options, across_ranks)
        else:
            ids = None if exclude is None else (exclude, exclude)
            softmax = distributed.info_nce_from_scores if across_ranks else info_nce_from_scores
            loss = softmax(scores, exclude=ids, **options)
        ceiling = math.log(pairs)
        bound = ceiling - loss
        self._warn_of_saturation(bound.detach(), ceiling)
        stats = {"bound": bound.detach(), "ceiling": bound.new_tensor(ceiling)}
        if ceiling:
            stats["saturation"] = stats["bound"] / ceiling
        return -bound, stats

    def _check(
        self, scores: Tensor, word_mask: Tensor | None, exclude: Tensor | None, across_ranks: bool
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
        if self.bound != "nce" and exclude is not None:
            raise ValueError(f"exclude: the bound {self.bound!r} cannot leave pairs out")
        if self.bound != "nce" and scores.shape[1] < 2:
            raise ValueError(
                f"scores: the bound {self.bound!r} needs at least 2 pairs, got {scores.shape[1]}"
            )

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this estimator again, in JSON types."""
        return {"bound": self.bound, "direction": self.direction, "backend": self.backend}

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

    def _warn_of_saturation(self, bound: Tensor, ceiling: float) -> None:
        # looking at a value would stall an accelerator
        if self._warned or not ceiling or bound.device.type != "cpu":
            return
        if float(bound) > SATURATED * ceiling:
            self._warned = True
            pairs = round(math.exp(ceiling))
            warnings.warn(
                f"the bound is {float(bound):.2f} nats of at most log {pairs} = {ceiling:.2f}: "
                "a larger batch is needed to see more",
                stacklevel=3,
            )


def _word_loss(
    scores: Tensor,
    word_mask: Tensor | None,
    exclude: Tensor | None,
    options: dict[str, Any],
    across_ranks: bool,
) -> Tensor:
    """− mean over captions of the mean over words of log softmax over the pictures, at the caption's own picture."""
    _, captions, words = scores.shape
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
    return distributed.mean(each) if across_ranks else each.mean()
