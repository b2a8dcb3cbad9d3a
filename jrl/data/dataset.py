"""Samples as batches of tensors: a dataset for training and a view for retrieval."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset

from jrl.data.images import EMPTY, MAX_PIXELS, MISSING, TOO_LARGE, UNREADABLE, ImageError, load_image
from jrl.data.sample import Sample, SampleSet, SkipReport

Transform = Callable[[PIL.Image.Image, np.random.Generator], torch.Tensor]
Tokenizer = Callable[..., Mapping[str, torch.Tensor]]

_REASONS = (MISSING, EMPTY, TOO_LARGE, UNREADABLE)
_UNTRIED, _GOOD, _FIRST_BAD = 0, 1, 2
_FEWEST_TRIED = 64
_ATTEMPTS = 32


def tokenize(tokenizer: Tokenizer, caption: str, max_length: int | None) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, int64 [T], of one caption, without padding.

    Raises:
        TypeError: the tokenizer returns no tensor [1, T] under "input_ids".
    """
    encoded = tokenizer([caption], padding=False, truncation=True, max_length=max_length, return_tensors="pt")
    ids = encoded.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        raise TypeError(f"tokenizer must return a tensor [1, T] as 'input_ids', got {type(ids).__name__}")
    mask = encoded["attention_mask"] if "attention_mask" in encoded else torch.ones_like(ids)
    return {"input_ids": ids[0].long(), "attention_mask": mask[0].long()}


def collate(items: Sequence[Mapping[str, Any]], *, pad_token_id: int = 0) -> dict[str, Any]:
    """Join items into a batch: equal tensors are stacked, token rows are padded on the right to the longest.

    Args:
        items: dicts with the same fields, as the datasets here give.
        pad_token_id: fills `input_ids`; `attention_mask` is filled with 0.
    Returns:
        tensors [B, ...]; numbers as int64 [B]; strings as lists.
    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("items must hold at least one item, got none")
    batch: dict[str, Any] = {}
    for field, first in items[0].items():
        values = [item[field] for item in items]
        if field in ("input_ids", "attention_mask"):
            fill = pad_token_id if field == "input_ids" else 0
            batch[field] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        elif isinstance(first, torch.Tensor):
            batch[field] = torch.stack(values)
        elif isinstance(first, int):
            batch[field] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[field] = values
    return batch


class _Collates:
    tokenizer: Tokenizer | None

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As the function `collate`, with the tokenizer's padding token; for `DataLoader(collate_fn=)`."""
        return collate(items, pad_token_id=pad_token_id(self.tokenizer))


def pad_token_id(tokenizer: Tokenizer | None) -> int:
    """Return the tokenizer's padding token, 0 when it has none."""
    token = getattr(tokenizer, "pad_token_id", None)
    return 0 if token is None else int(token)


class CaptionDataset(_Collates, Dataset[dict[str, Any]]):
    """Pairs of a picture and one of its captions; what an index gives depends on (seed, epoch, index) alone.

    An item is a dict of `image` float32 [3, S, S], `input_ids` and `attention_mask` int64 [T] (with a
    tokenizer), `caption`, `key`, `index` (asked for) and `image_index` (the sample that was used). The two
    indices differ where a picture could not be used and the next, or then a random one, took its place.

    Args:
        samples: the samples; each needs a caption.
        transform: from a picture and a numpy Generator to a tensor, such as `ImageTransform`.
        tokenizer: called as a transformers tokenizer is; None leaves the tokens out.
        captions: "random", one a visit; "first"; or "all", an index a (picture, caption) pair.
        seed: of all random choices, at least 0.
        max_length: of the tokens; by default what the tokenizer says.
        max_pixels: as for `load_image`.
        on_bad_image: "replace" (counted in `skips`) or "raise". By default "raise" with captions="all", where
            a replacement would falsify an evaluation, and "replace" otherwise.
        max_bad_fraction: of the pictures tried, once 64 of them (or all) have been tried; above it, raise.
    Raises:
        ValueError: no samples, a sample without a caption, or an option out of range.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Transform,
        tokenizer: Tokenizer | None = None,
        *,
        captions: Literal["random", "first", "all"] = "random",
        seed: int = 0,
        max_length: int | None = None,
        max_pixels: int = MAX_PIXELS,
        on_bad_image: Literal["replace", "raise"] | None = None,
        max_bad_fraction: float = 0.5,
    ) -> None:
        if captions not in ("random", "first", "all"):
            raise ValueError(f"captions must be 'random', 'first' or 'all', got {captions!r}")
        if on_bad_image not in (None, "replace", "raise"):
            raise ValueError(f"on_bad_image must be 'replace' or 'raise', got {on_bad_image!r}")
        if on_bad_image == "replace" and captions == "all":
            raise ValueError("on_bad_image='replace' would falsify an evaluation with captions='all'")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must lie in [0, 1], got {max_bad_fraction}")
        if not len(samples):
            raise ValueError("samples must hold at least one sample, got none")
        for sample in samples:
            if not sample.captions:
                raise ValueError(f"samples: {sample.key!r} has no caption")
        self.samples = samples
        self.transform = transform
        self.tokenizer = tokenizer
        self.captions = captions
        self.seed = seed
        self.max_length = max_length
        self.max_pixels = max_pixels
        self.max_bad_fraction = max_bad_fraction
        self._replace = captions != "all" if on_bad_image is None else on_bad_image == "replace"
        self._pairs: np.ndarray | None = None
        if captions == "all":
            counts = [len(sample.captions) for sample in samples]
            owners = np.repeat(np.arange(len(samples)), counts)
            numbers = np.concatenate([np.arange(count) for count in counts])
            self._pairs = np.stack([owners, numbers], axis=1)
        # In shared memory, so that workers see a new epoch and the main process sees what workers met.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._state = torch.full((len(samples),), _UNTRIED, dtype=torch.uint8).share_memory_()
        self._warned = False

    def __len__(self) -> int:
        return len(self.samples) if self._pairs is None else len(self._pairs)

    @property
    def epoch(self) -> int:
        """The epoch that random choices depend on."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, at least 0; it reaches workers that are already running."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    @property
    def skips(self) -> SkipReport:
        """Pictures that could not be used so far, each counted once, met in whatever worker."""
        report = SkipReport()
        for code, reason in enumerate(_REASONS, start=_FIRST_BAD):
            found = (self._state == code).nonzero().flatten().tolist()
            for index in found:
                report.add(reason, self.samples[index].key)
        return report

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        index %= len(self)
        generator = np.random.default_rng([self.seed, self.epoch, index])
        if self._pairs is not None:
            image_index, number = (int(value) for value in self._pairs[index])
            image = self._load(image_index)
        else:
            image_index, image = self._load_or_replace(index, generator)
            count = len(self.samples[image_index].captions)
            number = int(generator.integers(count)) if self.captions == "random" else 0
        sample = self.samples[image_index]
        caption = sample.captions[number]
        item: dict[str, Any] = {"image": self.transform(image, generator)}
        if self.tokenizer is not None:
            item.update(tokenize(self.tokenizer, caption, self.max_length))
        item.update(caption=caption, key=sample.key, index=index, image_index=image_index)
        return item

    def _load(self, index: int) -> PIL.Image.Image:
        sample = self.samples[index]
        try:
            image = load_image(sample.image, max_pixels=self.max_pixels, name=sample.key)
        except ImageError as error:
            self._state[index] = _FIRST_BAD + _REASONS.index(error.reason)
            raise
        self._state[index] = _GOOD
        return image

    def _load_or_replace(self, index: int, generator: np.random.Generator) -> tuple[int, PIL.Image.Image]:
        for attempt in range(_ATTEMPTS):
            # A neighbour is often bad for the same reason, hence at random after the first.
            step = 0 if attempt == 0 else 1 if attempt == 1 else int(generator.integers(len(self.samples)))
            candidate = (index + step) % len(self.samples)
            try:
                return candidate, self._load(candidate)
            except ImageError as error:
                if not self._replace:
                    raise
                self._check_fraction(error)
        raise ImageError(f"{_ATTEMPTS} pictures in a row cannot be used; {self.skips.summary()}")

    def _check_fraction(self, error: ImageError) -> None:
        tried = int((self._state != _UNTRIED).sum())
        bad = int((self._state >= _FIRST_BAD).sum())
        if tried >= min(len(self.samples), _FEWEST_TRIED) and bad > self.max_bad_fraction * tried:
            raise ImageError(
                f"{bad} of {tried} pictures tried cannot be used, more than max_bad_fraction="
                f"{self.max_bad_fraction}; {self.skips.summary()}\nthe last: {error}"
            ) from error
        if not self._warned:
            self._warned = True
            warnings.warn(f"{error}; another picture takes its place, see .skips for the count", stacklevel=2)


def drop_unreadable(samples: Sequence[Sample], *, max_pixels: int = MAX_PIXELS) -> SampleSet:
    """Decode every picture once and return the samples that can be used; the others are counted in `skips`.

    Raises:
        ValueError: none can be used.
    """
    skips = SkipReport()
    if isinstance(samples, SampleSet):
        skips.merge(samples.skips)
    name = samples.name if isinstance(samples, SampleSet) else ""
    kept = []
    for sample in samples:
        try:
            load_image(sample.image, max_pixels=max_pixels, name=sample.key)
        except ImageError as error:
            skips.add(error.reason, str(error))
        else:
            kept.append(sample)
    skips.raise_if_empty(len(kept), name or "samples")
    return SampleSet(kept, name=name, skips=skips)


class RetrievalView:
    """The distinct pictures and all the captions of a set, for retrieval both ways.

    Args:
        samples: the samples; those without a caption that counts are left out and counted in `skips`.
        transform: as for `CaptionDataset`; it should make no random choices.
        tokenizer: called as a transformers tokenizer is.
        language: only captions in this language; None for all.
        captions_per_image: at most so many, the first ones; None for all.
        max_length: of the tokens; by default what the tokenizer says.
        max_pixels: as for `load_image`.

    Attributes:
        images: dataset of `image` [3, S, S], `key`, `index`; a picture that cannot be used raises ImageError
            (`drop_unreadable` removes such beforehand).
        captions: dataset of `input_ids`, `attention_mask`, `caption`, `index`.
        caption_to_image: int64 [C], for each caption the index of its picture in `images`.
    Raises:
        ValueError: no caption is left, or `captions_per_image` is not positive.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Transform,
        tokenizer: Tokenizer,
        *,
        language: str | None = None,
        captions_per_image: int | None = None,
        max_length: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if captions_per_image is not None and captions_per_image < 1:
            raise ValueError(f"captions_per_image must be positive, got {captions_per_image}")
        self.skips = SkipReport()
        self.samples: list[Sample] = []
        texts: list[str] = []
        owners: list[int] = []
        for sample in samples:
            pairs = zip(sample.captions, sample.languages, strict=True)
            own = [text for text, code in pairs if language in (None, code)][:captions_per_image]
            if not own:
                self.skips.add("no caption" + (f" in {language}" if language else ""), sample.key)
                continue
            owners.extend([len(self.samples)] * len(own))
            texts.extend(own)
            self.samples.append(sample)
        self.skips.raise_if_empty(len(self.samples), "samples")
        self.caption_to_image = torch.tensor(owners, dtype=torch.int64)
        self.images = _Images(self.samples, transform, max_pixels)
        self.captions = _Captions(texts, tokenizer, max_length)


class _Images(_Collates, Dataset[dict[str, Any]]):
    tokenizer = None

    def __init__(self, samples: list[Sample], transform: Transform, max_pixels: int) -> None:
        self.samples, self.transform, self.max_pixels = samples, transform, max_pixels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image = load_image(sample.image, max_pixels=self.max_pixels, name=sample.key)
        tensor = self.transform(image, np.random.default_rng([0, 0, index]))
        return {"image": tensor, "key": sample.key, "index": index}


class _Captions(_Collates, Dataset[dict[str, Any]]):
    tokenizer: Tokenizer

    def __init__(self, texts: list[str], tokenizer: Tokenizer, max_length: int | None) -> None:
        self.texts, self.tokenizer, self.max_length = texts, tokenizer, max_length

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        caption = self.texts[index]
        tokens = tokenize(self.tokenizer, caption, self.max_length)
        return {**tokens, "caption": caption, "index": index}
