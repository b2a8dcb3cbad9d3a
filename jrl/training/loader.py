"""Batches that depend on (seed, epoch, step) alone, so that a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jrl.data.sample import SkipReport

Batch = dict[str, Any]


class BatchSource(Protocol):
    """Where batches come from."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, indices: Tensor, seed: int) -> Batch:
        """The batch of these examples; `seed` decides everything random in it."""


class EpochLoader:
    """Shuffled batches of a source, cut among the ranks.

    Args:
        source: where batches come from.
        batch_size: examples in a batch of one rank.
        seed: of the order and of the augmentation.
        rank, world_size: this process and how many there are; each gets the same number of batches.
        workers: processes that prepare batches; 0 prepares them in this one.
        position: says (epoch, step) when an iterator starts, so that a resumed run goes on inside an epoch.

    Raises:
        ValueError: a value out of range, or fewer examples than one batch of every rank.
    """

    def __init__(
        self,
        source: BatchSource,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        position: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if workers < 0:
            raise ValueError(f"workers: expected 0 or more, got {workers}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected a value in [0, {world_size}), got {rank}")
        if len(source) < batch_size * world_size:
            raise ValueError(
                f"batch_size: {world_size} × {batch_size} examples make one step, there are {len(source)}"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self._position = position
        self.skips = SkipReport()
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.source) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self._position() if self._position is not None else (self._epoch, 0)
        self._epoch = epoch + 1
        generator = torch.Generator().manual_seed(_seed(self.seed, epoch))
        order = torch.randperm(len(self.source), generator=generator)
        size = self.batch_size * self.world_size
        jobs = [
            (
                order[step * size : (step + 1) * size][self.rank :: self.world_size],
                _seed(self.seed, epoch, step, self.rank),
            )
            for step in range(start, len(self))
        ]
        yield from _run(self.source, jobs, self.workers, self.skips)

    def state_dict(self) -> dict[str, int]:
        """What the order of the batches depends on."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "examples": len(self.source),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Check that a resumed run will see the batches that it would have seen.

        Raises:
            ValueError: the seed, the batch size, the number of ranks or of examples is another.
        """
        now = self.state_dict()
        changed = [
            f"{name} was {state.get(name)}, is {value}"
            for name, value in now.items()
            if state.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"resume: the batches would not be those of the run that stopped: {'; '.join(changed)}"
            )


class PartLoader:
    """All examples of a source in order, for evaluation; every rank sees all of them.

    Args:
        source: where batches come from.
        batch_size: examples in a batch.
        name: of the part, for the names of its metrics.
        workers: processes that prepare batches.
    """

    def __init__(self, source: BatchSource, batch_size: int, *, name: str, workers: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.source, self.batch_size, self.name, self.workers = source, batch_size, name, workers
        self.skips = SkipReport()

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        jobs = [(indices, 0) for indices in torch.arange(len(self.source)).split(self.batch_size)]
        yield from _run(self.source, jobs, self.workers, self.skips)


class _Jobs(Dataset[Batch]):
    def __init__(self, source: BatchSource, jobs: list[tuple[Tensor, int]]) -> None:
        self.source, self.jobs = source, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Batch:
        return self.source.batch(*self.jobs[index])


def _run(
    source: BatchSource, jobs: list[tuple[Tensor, int]], workers: int, skips: SkipReport
) -> Iterator[Batch]:
    batches: Iterable[Batch]
    if workers:
        # an own generator: DataLoader would otherwise draw its base seed from the global one
        generator = torch.Generator().manual_seed(0)
        batches = DataLoader(_Jobs(source, jobs), batch_size=None, num_workers=workers, generator=generator)
    else:
        batches = (source.batch(indices, seed) for indices, seed in jobs)
    for batch in batches:
        for reason, message in batch.pop("skipped", ()):
            skips.add(reason, message)
        yield batch


def _seed(*parts: int) -> int:
    low, high = np.random.SeedSequence(parts).generate_state(2, dtype=np.uint32)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32
