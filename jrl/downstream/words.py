"""Texts of a task as token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jrl.data.tokenizer import CLS, EOS, PAD, train_tokenizer

_VOCABULARY = 512
_MAX_LENGTH = 96


class Words:
    """A tokenizer trained on the texts of the training scenes.

    Args:
        texts: to learn from.

    Raises:
        ValueError: no text.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.tokenizer: PreTrainedTokenizerBase = train_tokenizer(
            texts, vocabulary_size=_VOCABULARY, max_length=_MAX_LENGTH
        )
        ids = self.tokenizer.get_vocab()
        self.pad, self.start, self.end = ids[PAD], ids[CLS], ids[EOS]

    def __len__(self) -> int:
        return len(self.tokenizer)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), T] int64: start, tokens, end, padding."""
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return torch.as_tensor(encoded["input_ids"])

    def texts(self, ids: Tensor) -> list[str]:
        """What rows of ids [E, T] say, up to the end."""
        found: list[str] = []
        for row in ids.tolist():
            row = row[: row.index(self.end)] if self.end in row else row
            found.append(str(self.tokenizer.decode(row, skip_special_tokens=True)).strip())
        return found
