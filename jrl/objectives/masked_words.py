"""BERT's objective: guess hidden words from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Tokens(Protocol):
    tokens: Tensor


class _Encoder(Protocol):
    model: Any

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, /) -> _Tokens: ...


def corrupt(
    input_ids: Tensor, candidates: Tensor, words: Tensor, *, probability: float, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """Choose tokens to guess and hide most of them: of those chosen 80 % become [MASK], 10 % a random word, 10 % stay.

    Args:
        input_ids: [B, L] int64.
        candidates: [B, L] bool, which may be chosen.
        words: [W] int64, ids that random words are drawn from.
        probability: of being chosen, each on its own.
        mask_token_id: of [MASK].

    Returns:
        The corrupted ids [B, L], and [B, L] bool, which were chosen. Draws come from torch's generator.
    """
    chosen = (torch.rand(input_ids.shape, device=input_ids.device) < probability) & candidates
    fate = torch.rand(input_ids.shape, device=input_ids.device)
    drawn = words[torch.randint(len(words), input_ids.shape, device=input_ids.device)]
    hidden = torch.where(fate < 0.8, mask_token_id, torch.where(fate < 0.9, drawn, input_ids))
    return torch.where(chosen, hidden, input_ids), chosen


class MaskedWords(nn.Module):
    """The masked-word loss of a text encoder.

        h = LN(gelu(W x + b)),   loss = mean over chosen tokens of CE(E h + c, the token)

    with E the encoder's own word embedding. Devlin et al. 2019.

    Args:
        width: of the encoder's tokens, and of its word embedding.
        vocab_size: words of the embedding.
        mask_token_id: of [MASK].
        special_token_ids: ids that are never hidden nor drawn, such as [PAD] and [CLS]; [MASK] is one always.
        probability: of hiding a word.

    Raises:
        ValueError: a value out of range.
    """

    special: Tensor
    words: Tensor

    def __init__(
        self,
        width: int,
        vocab_size: int,
        mask_token_id: int,
        special_token_ids: Sequence[int] = (),
        probability: float = 0.15,
    ) -> None:
        super().__init__()
        if width < 1 or vocab_size < 1:
            raise ValueError(f"width, vocab_size: expected at least 1, got {width}, {vocab_size}")
        if not 0 < probability <= 1:
            raise ValueError(f"probability: expected a share in (0, 1], got {probability}")
        for name, index in (
            ("mask_token_id", mask_token_id),
            *(("special_token_ids", i) for i in special_token_ids),
        ):
            if not 0 <= index < vocab_size:
                raise ValueError(f"{name}: expected ids in [0, {vocab_size}), got {index}")
        if len({mask_token_id, *special_token_ids}) == vocab_size:
            raise ValueError(f"special_token_ids: leave no word among {vocab_size} ids")
        self.width, self.vocab_size, self.probability = width, vocab_size, probability
        self.mask_token_id, self.special_token_ids = mask_token_id, tuple(special_token_ids)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        ids, special = torch.arange(vocab_size), torch.tensor([mask_token_id, *special_token_ids])
        # they follow from the arguments, so they are not saved
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("words", ids[torch.isin(ids, special, invert=True)], persistent=False)

    def forward(
        self, encoder: _Encoder, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hide words, encode the rest and guess them.

        Args:
            encoder: a `TextEncoder` or what behaves like one: a call to an output with `tokens`, and a transformers
                `model`.
            input_ids: [B, L] int64.
            attention_mask: [B, L], nonzero where a token is real; None when all are.

        Returns:
            The 0-d loss (0 where no word was chosen), and detached "accuracy" over the chosen words.

        Raises:
            ValueError: the encoder's embedding is not [vocab_size, width].
        """
        embedding: Tensor = encoder.model.get_input_embeddings().weight
        if embedding.shape != (self.vocab_size, self.width):
            raise ValueError(
                f"encoder: expected a word embedding [{self.vocab_size}, {self.width}], got {list(embedding.shape)}"
            )
        candidates = torch.isin(input_ids, self.special, invert=True)
        if attention_mask is not None:
            candidates &= attention_mask.bool()
        corrupted, chosen = corrupt(
            input_ids, candidates, self.words, probability=self.probability, mask_token_id=self.mask_token_id
        )
        tokens = encoder(corrupted, attention_mask).tokens[chosen]
        logits = F.linear(self.transform(tokens), embedding, self.bias).float()
        targets = input_ids[chosen]
        # a sum over no rows keeps its graph, a mean over none is NaN
        count = max(1, len(targets))
        loss = F.cross_entropy(logits, targets, reduction="sum") / count
        accuracy = (logits.detach().argmax(dim=-1) == targets).sum() / count
        return loss, {"accuracy": accuracy}

    def to_config(self) -> dict[str, Any]:
        """Arguments that build this objective again, in JSON types."""
        return {
            "width": self.width,
            "vocab_size": self.vocab_size,
            "mask_token_id": self.mask_token_id,
            "special_token_ids": list(self.special_token_ids),
            "probability": self.probability,
        }
