"""Tiny models of sentence-transformers, and pairs of sentences, made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = ["red", "green", "blue", "old", "new", "small", "big", "cat", "dog", "bird", "house", "tree"]
WORDS += ["runs", "sleeps", "sings", "falls", "in", "on", "under", "the", "a"]
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def checkpoint(folder: Path, seed: int, dropout: float = 0.1) -> str:
    """A BERT with random weights and a tokenizer of a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(seed)
    config = BertConfig(
        **SIZES,
        vocab_size=len(vocabulary),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def sentences(count: int, seed: int) -> list[str]:
    source = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count, 6), generator=source).tolist()
    return [" ".join(WORDS[i] for i in row[: 3 + place % 4]) for place, row in enumerate(picks)]
