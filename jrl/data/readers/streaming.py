"""Tar shards read from front to back, for sets too large to index; sharded by rank and worker."""

from __future__ import annotations

import itertools
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from jrl.data.dataset import Tokenizer, Transform, collate, pad_token_id, tokenize
from jrl.data.images import EMPTY, MAX_PIXELS, TOO_LARGE, UNREADABLE, ImageError, load_image
from jrl.data.readers.common import BAD_ROW, IMAGE_MISSING, NO_CAPTION, NOT_UTF8
from jrl.data.readers.shards import (
    MEMBER_SUFFIXES,
    NO_END_MARK,
    REPEATED_MEMBER,
    TRUNCATED,
    captions_of,
    expand_shards,
    parse_record,
    parse_text,
    shard_members,
    split_member_name,
)
from jrl.data.sample import SkipReport

_SKIPPED = (TRUNCATED, IMAGE_MISSING, NO_CAPTION, EMPTY, TOO_LARGE, UNREADABLE)
_NOTED = (REPEATED_MEMBER, NO_END_MARK, NOT_UTF8, BAD_ROW)
_REASONS = _SKIPPED + _NOTED
_GOOD = len(_REASONS)
_MOST_WORKERS = 256
_FEWEST_TRIED = 64


class StreamingCaptionDataset(IterableDataset[dict[str, Any]]):
    """Streams (picture, caption) items from tar shards of `key.jpg`, `key.txt`, `key.json`.

    Every epoch deals the shards anew over ranks and workers and mixes the samples in a buffer. The order
    depends on (seed, epoch, rank, world size, worker count); resuming starts at an epoch's beginning. An item
    is that of `CaptionDataset` without the indices.

    Args:
        shards: as for `expand_shards`; local and uncompressed.
        transform: from a picture and a numpy Generator to a tensor.
        tokenizer: called as a transformers tokenizer is; None leaves the tokens out.
        samples_per_epoch: items a rank gives an epoch, repeating its shards as needed; needed with several
            ranks, whose shards hold unequal numbers. None gives each item of the shards once.
        shuffle_buffer: samples held, undecoded, to be mixed; 0 keeps the order of the shards.
        seed: of all random choices, at least 0.
        caption_field: the field of `key.json` that holds the caption when there is no `key.txt`.
        max_length: of the tokens; by default what the tokenizer says.
        max_pixels: as for `load_image`.
        max_bad_fraction: of a worker's samples; above it, once 64 were tried, raise.
        rank, world_size: by default from torch.distributed or the variables RANK and WORLD_SIZE.
    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: an option out of range, or several ranks without `samples_per_epoch`.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        transform: Transform,
        tokenizer: Tokenizer | None = None,
        *,
        samples_per_epoch: int | None = None,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        caption_field: str = "caption",
        max_length: int | None = None,
        max_pixels: int = MAX_PIXELS,
        max_bad_fraction: float = 0.5,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.shards = expand_shards(shards)
        found_rank, found_size = _placement()
        self.rank = found_rank if rank is None else rank
        self.world_size = found_size if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in [0, world_size={self.world_size}), got {self.rank}")
        if samples_per_epoch is None and self.world_size > 1:
            raise ValueError(
                f"samples_per_epoch must be given with {self.world_size} ranks: their shards may hold "
                "unequal numbers of samples, and a rank that ends first leaves the others waiting"
            )
        if samples_per_epoch is not None and samples_per_epoch < 1:
            raise ValueError(f"samples_per_epoch must be positive, got {samples_per_epoch}")
        if shuffle_buffer < 0 or seed < 0:
            raise ValueError(f"shuffle_buffer and seed must be at least 0, got {shuffle_buffer} and {seed}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must lie in [0, 1], got {max_bad_fraction}")
        self.transform = transform
        self.tokenizer = tokenizer
        self.samples_per_epoch = samples_per_epoch
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.caption_field = caption_field
        self.max_length = max_length
        self.max_pixels = max_pixels
        self.max_bad_fraction = max_bad_fraction
        # In shared memory, as in CaptionDataset; a row a worker, so that no two write to the same place.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._counts = torch.zeros(_MOST_WORKERS, _GOOD + 1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that the order depends on."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, at least 0; it reaches workers that are already running when they start over."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    @property
    def skips(self) -> SkipReport:
        """Counts of this rank's workers over all epochs; the first of each reason was shown as a warning."""
        report = SkipReport()
        totals = self._counts.sum(0).tolist()
        for reason, count in zip(_REASONS, totals, strict=False):
            if count:
                count_it = report.add if reason in _SKIPPED else report.note
                count_it(reason, "see the warning", count)
        return report

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """As the function `collate`, with the tokenizer's padding token; for `DataLoader(collate_fn=)`."""
        return collate(items, pad_token_id=pad_token_id(self.tokenizer))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        consumers, consumer = self.world_size * workers, self.rank * workers + worker
        if len(self.shards) < consumers or workers > _MOST_WORKERS:
            raise ValueError(
                f"shards: {len(self.shards)} cannot feed {self.world_size} ranks of {workers} workers "
                f"(at most {_MOST_WORKERS}); lower num_workers or pack more shards"
            )
        epoch, counter = self.epoch, _Counter(self._counts[worker])
        wanted = None
        if self.samples_per_epoch is not None:
            wanted = self.samples_per_epoch // workers + (worker < self.samples_per_epoch % workers)
        given = 0
        # A pass reshuffles the shards for every rank alike, so that the shares of a pass stay disjoint.
        for number in range(1) if wanted is None else itertools.count():
            if given == wanted:
                return
            order = list(self.shards)
            if self.shuffle_buffer:
                np.random.default_rng([self.seed, epoch, number]).shuffle(order)
            before = given
            generator = np.random.default_rng([self.seed, epoch, number, consumer])
            for item in self._items(order[consumer::consumers], generator, counter):
                yield item
                given += 1
                if given == wanted:
                    return
            if given == before and (wanted is not None or consumers == 1):
                counter.raise_if_empty(0, f"worker {worker} of rank {self.rank}: {len(self.shards)} shards")

    def _items(
        self, shards: list[Path], generator: np.random.Generator, counter: _Counter
    ) -> Iterator[dict[str, Any]]:
        import webdataset

        def count_repeated(error: Exception) -> bool:
            counter.note(REPEATED_MEMBER, str(error.args[0]))
            return True

        def group(files: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            return webdataset.tariterators.group_by_keys(
                files, keys=split_member_name, handler=count_repeated
            )

        mixing = random.Random(int(generator.integers(1 << 62)))
        pipeline = webdataset.DataPipeline(
            lambda: _files(shards, counter),
            group,
            webdataset.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=mixing)
            if self.shuffle_buffer
            else None,
        )
        for record in pipeline:
            item = self._item(record, generator, counter)
            if item is not None:
                yield item

    def _item(
        self, record: dict[str, Any], generator: np.random.Generator, counter: _Counter
    ) -> dict[str, Any] | None:
        where = f"{record['__url__']}: {record['__key__']}"
        suffix = next((suffix for suffix in MEMBER_SUFFIXES if suffix in record), None)
        if suffix is None:
            counter.add(IMAGE_MISSING, where)
            return None
        text = parse_text(record["txt"], where, counter) if "txt" in record else None
        document = parse_record(record["json"], where, counter) if "json" in record else {}
        captions = captions_of(text, document, self.caption_field)
        if not captions:
            counter.add(NO_CAPTION, where)
            return None
        try:
            image = load_image(record[suffix], max_pixels=self.max_pixels, name=where)
        except ImageError as error:
            counter.add(error.reason, str(error))
            counter.check_fraction(self.max_bad_fraction)
            return None
        counter.count_good()
        item: dict[str, Any] = {"image": self.transform(image, generator)}
        if self.tokenizer is not None:
            item.update(tokenize(self.tokenizer, captions[0], self.max_length))
        item.update(caption=captions[0], key=record["__key__"])
        return item


def _files(shards: list[Path], counter: _Counter) -> Iterator[dict[str, Any]]:
    """Yield each shard's files with their bytes, and an empty dict at its end, for webdataset to group."""
    for path in shards:
        with open(path, "rb") as file:
            for member in shard_members(path, file, path.stat().st_size, counter):
                suffix = split_member_name(member.name)[1]
                if suffix not in (*MEMBER_SUFFIXES, "txt", "json"):
                    continue
                position = file.tell()
                file.seek(member.offset_data)
                yield {"fname": member.name, "data": file.read(member.size), "__url__": str(path)}
                file.seek(position)
        yield {}


class _Counter(SkipReport):
    """Counts into one row of shared memory, and warns at the first of each reason."""

    def __init__(self, row: torch.Tensor) -> None:
        super().__init__(limit=1)
        self._row = row

    def add(self, reason: str, example: str, count: int = 1) -> None:
        super().add(reason, example, count)
        self._share(reason, example, count)

    def note(self, reason: str, example: str, count: int = 1) -> None:
        super().note(reason, example, count)
        self._share(reason, example, count)

    def _share(self, reason: str, example: str, count: int) -> None:
        position = _REASONS.index(reason)
        if self._row[position] == 0:
            warnings.warn(f"{reason}: {example}; further ones are counted in .skips", stacklevel=3)
        self._row[position] += count

    def count_good(self) -> None:
        self._row[_GOOD] += 1

    def check_fraction(self, limit: float) -> None:
        bad = int(sum(self._row[_REASONS.index(reason)] for reason in (EMPTY, TOO_LARGE, UNREADABLE)))
        tried = bad + int(self._row[_GOOD])
        if tried >= _FEWEST_TRIED and bad > limit * tried:
            raise ImageError(
                f"{bad} of {tried} pictures cannot be used, more than max_bad_fraction={limit}; "
                + self.summary()
            )


def _placement() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
