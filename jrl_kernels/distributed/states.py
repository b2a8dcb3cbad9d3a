"""Sums of a softmax over disjoint sets of candidates, merged into the sums over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def placed(state: Tensor, place: int) -> Tensor:
    """An operator's state [7, n] (see `ops.info_nce.autograd`) as [n, 8]; the last says where this set lies among all of them."""
    return torch.cat([state.T, state.new_full((state.shape[1], 1), float(place))], 1)


def merged(states: Sequence[Tensor], multi_positive: str) -> Tensor:
    """States [n, 8] over disjoint sets of candidates, in any order, as the state over all of them.

    In float64, so that one merge after another loses nothing of a float32.
    """
    sums, positive, count, correct, entropy, candidates, maximum, place = (
        torch.stack([state.double() for state in states]).unbind(2)
    )  # fmt: skip
    total, counts = sums.logsumexp(0), count.sum(0)
    if multi_positive == "sum":
        term = torch.where(count > 0, positive, -torch.inf).logsumexp(0)
    else:
        term = (positive * count).sum(0) / counts.clamp(min=1)
    term = torch.where(counts > 0, term, 0.0)
    # entropy = log-sum-exp - expectation of the logits, and expectations add up by their share of the sum
    some = candidates > 0
    share = torch.where(some, (sums - total).exp(), 0.0)
    expectation = (share * torch.where(some, sums - entropy, 0.0)).sum(0)
    # the first of equal maxima, as in one process
    top = torch.where(some, maximum, -torch.inf).amax(0)
    best = torch.where(some & (maximum == top), place, torch.inf).argmin(0, keepdim=True)
    return torch.stack(
        [
            total,
            term,
            counts,
            correct.gather(0, best)[0],
            torch.where(candidates.sum(0) > 0, total - expectation, 0.0),
            candidates.sum(0),
            maximum.amax(0),
            place.gather(0, best)[0],
        ],
        1,
    )
