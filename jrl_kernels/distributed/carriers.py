"""How the columns of all ranks come to this rank's rows: gathered all at once, or round a ring block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from .ranks import Ranks

FORMS = ("gather", "ring")
Compute = Callable[..., Tensor | None]
Combine = Callable[[Sequence[Tensor]], Tensor]


class Gathered:
    """Every rank holds the columns of all ranks, and takes them in one block."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def bring(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What `visit` takes, from this rank's columns [b, ...] of each tensor."""
        return tuple(self.ranks.gather(tensor) for tensor in tensors)

    def visit(
        self, brought: Sequence[Tensor], compute: Compute, combine: Combine | None = None
    ) -> Tensor | None:
        """Calls compute(place, *block) for each block of columns of all ranks, in the order in which they come.

        Args:
            brought: what `bring` returned.
            compute: takes where the block lies among all columns, a slice, and its columns of each tensor; returns what this
                rank has to say of each of these columns [n, ...], or always None.
            combine: what several ranks said of the same columns, into one; their sum when None. Also called with one.

        Returns:
            What all ranks said of this rank's columns [b, ...]; None where compute returned None.
        """
        found = compute(slice(0, self.ranks.total), *brought)
        if found is None:
            return None
        return (
            self.ranks.scatter_sum(found) if combine is None else combine(self.ranks.deliver(found).unbind())
        )


class Ring:
    """Blocks of columns pass from each rank to the next; no rank ever holds more than two.

    A block is under way while the one before it is computed. What ranks say of a block follows it one step behind, so that
    this too is under way during a computation, and comes home with the last step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        # messages of one size whatever the ranks' shares: an empty one is no message to some backends
        self._length = max(1, *ranks.rows)

    def bring(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As `Gathered.bring`."""
        return tuple(self._padded(tensor) for tensor in tensors)

    def visit(
        self, brought: Sequence[Tensor], compute: Compute, combine: Combine | None = None
    ) -> Tensor | None:
        """As `Gathered.visit`: one block of each rank, this rank's first."""
        ranks, combine = self.ranks, combine or _sum
        block, said = list(brought), None
        for step in range(ranks.size):
            owner = (ranks.rank - step) % ranks.size
            more = step < ranks.size - 1
            arriving = self._pass(block, "passing columns round the ranks", 0) if more else None
            found = compute(ranks.slice(owner), *(tensor[: ranks.rows[owner]] for tensor in block))
            if found is not None:
                before: list[Tensor] = [] if said is None else [said()[0][: ranks.rows[owner]]]
                said = self._pass(
                    [self._padded(combine([*before, found]))],
                    "passing on what ranks say of columns",
                    len(block),
                )
            if arriving is not None:
                block = arriving()
        return None if said is None else said()[0][: ranks.rows[ranks.rank]]

    def _padded(self, tensor: Tensor) -> Tensor:
        missing = self._length - tensor.shape[0]
        return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor.contiguous()

    def _pass(self, tensors: Sequence[Tensor], what: str, tag: int) -> Callable[[], list[Tensor]]:
        """Starts sending to the next rank; the result waits for what the rank before has sent."""
        ranks = self.ranks
        if ranks.size == 1:
            return lambda: list(tensors)
        after, before = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
        received = [torch.empty_like(tensor) for tensor in tensors]
        # tags tell columns from what is said of them where the same two ranks exchange both at once
        operations = []
        for place, (sent, room) in enumerate(zip(tensors, received, strict=True), tag):
            operations += [
                dist.P2POp(dist.isend, sent, group=ranks.group, tag=place, group_peer=after),
                dist.P2POp(dist.irecv, room, group=ranks.group, tag=place, group_peer=before),
            ]
        works = ranks.run(what, lambda: dist.batch_isend_irecv(operations))

        def arrived() -> list[Tensor]:
            for work in works:
                ranks.run(what, work.wait)
            operations.clear()  # until now they kept what was sent
            return received

        return arrived


def _sum(parts: Sequence[Tensor]) -> Tensor:
    *before, found = parts
    for part in before:
        found += part  # in place: it is new, and as large as a block
    return found


Carrier = Gathered | Ring


def check_form(op: str, form: str, backend: str) -> None:
    _checks.choice(op, "form", form, FORMS)
    if form == "ring" and backend == "reference":
        raise NotImplementedError(
            f"{op}: form 'ring' needs a fused backend, got 'reference'; use form='gather'"
        )


def carrier(form: str, ranks: Ranks) -> Carrier:
    return Ring(ranks) if form == "ring" else Gathered(ranks)
