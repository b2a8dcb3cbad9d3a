"""Which caption of a picture a training step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jrl.data.nouns import Prompts
from jrl.data.sample import Sample, SkipReport
from jrl.training.loader import Batch
from jrl.training.text_cache import TextCache


@dataclass(frozen=True)
class CaptionMix:
    """Weights of the ways to caption a picture with keywords; what a picture lacks becomes its first caption.

    Args:
        first: the first caption alone.
        first_and_tags: the first caption and 1 to 4 random keywords, shuffled and joined by commas.
        tags: 2 to 5 random keywords, joined by commas.
        others: one of the other captions.

    Raises:
        ValueError: a weight is negative, or none is positive.
    """

    first: float = 0.5
    first_and_tags: float = 0.2
    tags: float = 0.1
    others: float = 0.2

    def __post_init__(self) -> None:
        weights = (self.first, self.first_and_tags, self.tags, self.others)
        if min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"caption_mix: expected weights of 0 or more, not all 0, got {weights}")

    def draw(self, captions: Sequence[str], tags: Sequence[str], generator: np.random.Generator) -> str:
        """One caption; `captions` holds at least one."""
        weights = np.array([self.first, self.first_and_tags, self.tags, self.others])
        way = int(generator.choice(4, p=weights / weights.sum()))
        if way == 3 and len(captions) > 1:
            return captions[1 + int(generator.integers(len(captions) - 1))]
        if way == 1 and tags:
            count = min(len(tags), int(generator.integers(1, 5)))
            chosen = [captions[0], *(tags[i] for i in generator.permutation(len(tags))[:count])]
            return ", ".join(chosen[i] for i in generator.permutation(len(chosen)))
        if way == 2 and len(tags) > 1:
            count = min(len(tags), int(generator.integers(2, 6)))
            return ", ".join(tags[i] for i in generator.permutation(len(tags))[:count])
        return captions[0]


class Captions:
    """The captions of every sample, tokenised once; with a mix, drawn and tokenised batch by batch.

    Args:
        captions: of each sample, one or more.
        tokenizer: a transformers tokenizer.
        max_length: tokens after which a caption is cut.
        mix: how training draws captions; one of the given ones at random when None.
        tags: keywords of each sample, for the mix.
        prompts: makes prompts of the caption that was drawn; None for none.
        padding: to the "longest" caption of a batch, or always to "max_length".

    Attributes:
        cache: embeddings of all captions in their order, which then come with every batch; None for none.
    """

    def __init__(
        self,
        captions: Sequence[Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        mix: CaptionMix | None = None,
        tags: Sequence[Sequence[str]] | None = None,
        prompts: Prompts | None = None,
        padding: str = "longest",
    ) -> None:
        self.padding = padding
        self.captions, self.tokenizer, self.max_length, self.mix = captions, tokenizer, max_length, mix
        self.tags = [()] * len(captions) if tags is None else tags
        self.cache: TextCache | None = None
        self.prompts = prompts
        counts = torch.tensor([len(several) for several in captions])
        self.start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        if mix is None:
            self.input_ids, self.attention_mask = self._tokenise(self.flat)

    @property
    def flat(self) -> list[str]:
        """The captions of all samples, one after the other."""
        return [caption for several in self.captions for caption in several]

    def one_each(self, indices: Tensor, seed: int) -> Batch:
        """One random caption of each sample, and `prompt_ids` and `prompt_mask` [B, K, L] when there are prompts.

        A prompt that is the caption again has no real token: systems take it for the caption and need not encode it.
        """
        generator = np.random.default_rng((seed, 1))
        if self.mix is not None:
            texts = [self.mix.draw(self.captions[i], self.tags[i], generator) for i in indices.tolist()]
            input_ids, attention_mask = self._tokenise(texts)
            batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        else:
            start, count = self.start[indices], self.start[indices + 1] - self.start[indices]
            drawn = torch.from_numpy(generator.integers(0, count.numpy()))
            texts = [self.captions[i][j] for i, j in zip(indices.tolist(), drawn.tolist(), strict=True)]
            batch = self._rows(start + drawn)
        if self.prompts is not None:
            batch.update(self._prompts(self.prompts, texts, seed))
        return batch

    def all_of(self, indices: Tensor) -> Batch:
        """All captions of the samples; `caption_image` says whose each is among `image_index`."""
        start, end = self.start[indices], self.start[indices + 1]
        rows = torch.cat([torch.arange(int(a), int(b)) for a, b in zip(start, end, strict=True)])
        owners = indices.repeat_interleave(end - start)
        return {**self._rows(rows), "image_index": indices, "caption_image": owners}

    def _prompts(self, prompts: Prompts, texts: list[str], seed: int) -> Batch:
        # a stream of its own: prompts must not change which captions are drawn
        generator = np.random.default_rng((seed, 2))
        drawn = [
            "" if prompt == text else prompt for text in texts for prompt in prompts.draw(text, generator)
        ]
        ids, mask = self._tokenise(drawn)
        mask = mask & torch.tensor([bool(prompt) for prompt in drawn])[:, None]
        each = (len(texts), prompts.count)
        return {"prompt_ids": ids.unflatten(0, each), "prompt_mask": mask.unflatten(0, each)}

    def _tokenise(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer(
            texts, padding=self.padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def _rows(self, rows: Tensor) -> Batch:
        mask = self.attention_mask[rows]
        first, last = 0, mask.shape[1]
        if self.padding == "longest":
            # padding beyond the longest caption of this batch is only work
            used = mask.any(dim=0).nonzero()
            first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        embedded = {} if self.cache is None else self.cache.rows(rows, slice(first, last))
        return {
            "input_ids": self.input_ids[rows, first:last],
            "attention_mask": mask[:, first:last],
            **embedded,
        }


def with_captions(
    samples: Sequence[Sample], languages: Sequence[str] | None, skips: SkipReport
) -> tuple[list[Sample], list[list[str]]]:
    """The samples that have a caption in one of the languages, and those captions.

    Args:
        samples: the samples.
        languages: codes to keep; all when None.
        skips: counts the samples left without a caption.
    """
    kept: list[Sample] = []
    captions: list[list[str]] = []
    for sample in samples:
        texts = [
            caption
            for caption, language in zip(sample.captions, sample.languages, strict=True)
            if languages is None or language in languages
        ]
        if texts:
            kept.append(sample)
            captions.append(texts)
        else:
            skips.add("no caption in the chosen languages", sample.key)
    return kept, captions
