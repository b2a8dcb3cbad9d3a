"""The record that every reader produces, the sequence that holds it, and the account of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import PIL.Image

ImageSource: TypeAlias = Path | bytes | PIL.Image.Image | Callable[[], PIL.Image.Image]
MaskSource: TypeAlias = np.ndarray | Path | Callable[[], np.ndarray]


@dataclass(slots=True)
class SceneObject:
    """A labelled thing in a picture; `box` is (x0, y0, x1, y1) in pixels, `mask_id` its value in the mask."""

    label: str
    attributes: tuple[str, ...]
    box: tuple[float, float, float, float]
    mask_id: int | None = None


@dataclass(slots=True)
class Phrase:
    """The characters `start:end` of `captions[caption]` and the objects (indices) that they name."""

    caption: int
    start: int
    end: int
    objects: tuple[int, ...]


class TimedWord(NamedTuple):
    """An utterance and the seconds at which it begins and ends."""

    text: str
    start: float
    end: float


@dataclass(slots=True)
class Sample:
    """One picture and all that is known about it.

    Args:
        key: unique within its dataset.
        image: path, encoded bytes, picture, or a function that returns a picture; opened by `load_image`.
        captions: zero or more captions.
        languages: one BCP-47 code a caption; "und" (undetermined) for all when left empty.
        tags: unordered keywords.
        split: "train", "val", "test" or a name of the dataset's own; "" when there is none.
        objects: labelled boxes.
        relations: (subject, predicate, object), the ends being indices into `objects`.
        mask: integers [H, W]: index into `objects` + 1, 0 for background; or a file or function giving it.
        phrases: links from spans of the captions to objects.
        traces: one list a caption, of float32 strokes [P, 3] of (x, y, t): x and y in [0, 1], t in seconds.
        timed_words: one list a caption.
        metadata: whatever else the format carries.

    Raises:
        ValueError: `languages` is neither empty nor as long as `captions`.
    """

    key: str
    image: ImageSource
    captions: list[str]
    languages: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    split: str = ""
    objects: list[SceneObject] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    mask: MaskSource | None = None
    phrases: list[Phrase] = field(default_factory=list)
    traces: list[list[np.ndarray]] = field(default_factory=list)
    timed_words: list[list[TimedWord]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.languages:
            self.languages = ["und"] * len(self.captions)
        elif len(self.languages) != len(self.captions):
            raise ValueError(
                f"sample {self.key!r}: languages must have one entry a caption ({len(self.captions)}), "
                f"got {len(self.languages)}"
            )

    def load_mask(self) -> np.ndarray | None:
        """Return the mask as integers [H, W], reading it when it is a file or a function; None without one.

        Raises:
            ValueError: the mask cannot be read, or is not a two-dimensional array of integers.
        """
        if self.mask is None:
            return None
        if isinstance(self.mask, Path):
            try:
                with PIL.Image.open(self.mask) as picture:
                    mask = np.array(picture)
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"sample {self.key!r}: cannot read mask {self.mask}: {error}") from error
        else:
            mask = self.mask() if callable(self.mask) else self.mask
        if mask.ndim != 2 or not np.issubdtype(mask.dtype, np.integer):
            raise ValueError(
                f"sample {self.key!r}: mask must be integers [H, W], got {mask.dtype} {list(mask.shape)}"
            )
        return mask


class SkipReport:
    """Counts, reason by reason, of entries that were left out (`add`) or kept with a defect (`note`).

    Args:
        limit: how many examples (file, line and cause) to keep of each reason.
    """

    def __init__(self, limit: int = 5) -> None:
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count `count` entries left out for `reason`; `example` says which and why."""
        self.counts[reason] += count
        self._keep(reason, example)

    def note(self, reason: str, example: str, count: int = 1) -> None:
        """Count defects that cost no sample, such as a repeated key that was renamed."""
        self.notes[reason] += count
        self._keep(reason, example)

    def _keep(self, reason: str, example: str) -> None:
        kept = self.examples.setdefault(reason, [])
        if len(kept) < self.limit:
            kept.append(example)

    def merge(self, other: SkipReport) -> None:
        """Add the counts and examples of another report to this one."""
        self.counts.update(other.counts)
        self.notes.update(other.notes)
        for reason, examples in other.examples.items():
            for example in examples:
                self._keep(reason, example)

    @property
    def skipped(self) -> int:
        """How many entries were left out."""
        return sum(self.counts.values())

    def summary(self) -> str:
        """Return the counts, largest first, with their examples, as lines of text."""
        lines = [f"{self.skipped} skipped" if self.skipped else "nothing skipped"]
        for title, counts in (("", self.counts), ("noted: ", self.notes)):
            for reason, count in counts.most_common():
                lines.append(f"  {title}{reason}: {count}")
                lines.extend(f"    {example}" for example in self.examples.get(reason, []))
        return "\n".join(lines)

    def raise_if_empty(self, kept: int, source: object) -> None:
        """Raise ValueError naming `source`, with the reasons, when no entry was kept."""
        if kept == 0:
            raise ValueError(f"{source}: no usable sample; {self.summary()}")

    def __repr__(self) -> str:
        return f"SkipReport(skipped={self.skipped}, counts={dict(self.counts)}, notes={dict(self.notes)})"


class SampleSet(Sequence[Sample]):
    """An immutable sequence of samples with distinct keys.

    Args:
        samples: the samples.
        name: what to call the set in messages.
        skips: what the reader left out.

    Raises:
        ValueError: two samples share a key.
    """

    def __init__(self, samples: Iterable[Sample], *, name: str = "", skips: SkipReport | None = None) -> None:
        self._samples = list(samples)
        self.name = name
        self.skips = SkipReport() if skips is None else skips
        seen: set[str] = set()
        for sample in self._samples:
            if sample.key in seen:
                raise ValueError(f"dataset {name!r}: key {sample.key!r} occurs twice; keys must be distinct")
            seen.add(sample.key)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> SampleSet: ...
    def __getitem__(self, index: int | slice) -> Sample | SampleSet:
        if isinstance(index, slice):
            return SampleSet(self._samples[index], name=self.name, skips=self.skips)
        return self._samples[index]

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @property
    def splits(self) -> dict[str, int]:
        """How many samples each split holds."""
        return dict(Counter(sample.split for sample in self._samples))

    def select(self, split: str) -> SampleSet:
        """Return the samples of one split.

        Raises:
            ValueError: there is none; the message lists the splits that exist.
        """
        chosen = [sample for sample in self._samples if sample.split == split]
        if not chosen:
            raise ValueError(f"dataset {self.name!r} has no split {split!r}; it has {self.splits}")
        return SampleSet(chosen, name=f"{self.name}/{split}" if self.name else split, skips=self.skips)

    def __repr__(self) -> str:
        skipped = self.skips.skipped
        return f"SampleSet({self.name!r}, {len(self)} samples, splits={self.splits}, {skipped} skipped)"
