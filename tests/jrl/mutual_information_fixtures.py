"""A small mutual-information system, and pictures of squares to train it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jrl.encoders import ImageEncoder, TextEncoder
from jrl.systems import CriticOptions, MutualInformation

RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [16, 24],
    "depths": [1, 1],
    "layer_type": "basic",
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 32,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SPECIAL = [0, 2, 3]
COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]])


def small(**options: Any) -> MutualInformation:
    torch.manual_seed(0)
    critic = {"dim": 16, "scale": None, **options.pop("critic", {})}
    options.setdefault("special_token_ids", SPECIAL)
    text = options.pop("text_encoder", None) or TextEncoder(BERT)
    return MutualInformation(ImageEncoder(RESNET), text, CriticOptions(**critic), **options)


def squares(rows: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Pictures of two squares of different colours, "[CLS] colour colour [EOS]" in any order, and the cell of each word."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(rows)])
    cell = torch.stack([torch.randperm(16, generator=generator)[:2] for _ in range(rows)])
    pixels = 0.1 * torch.randn(rows, 3, 32, 32, generator=generator)
    for row in range(rows):
        for hue, place in zip(colour[row].tolist(), cell[row].tolist(), strict=True):
            y, x = 8 * (place // 4), 8 * (place % 4)
            pixels[row, :, y : y + 8, x : x + 8] += COLOURS[hue][:, None, None]
    ids = torch.cat(
        [torch.full((rows, 1), 2), 5 + colour, torch.full((rows, 1), 3), torch.zeros(rows, 1).long()], 1
    )
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids != 0}, cell


def train(system: MutualInformation, steps: int, rows: int = 32, lr: float = 3e-3) -> list[float]:
    system.train()
    optimizer = torch.optim.AdamW([p for p in system.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        values, _ = system(squares(rows, step)[0])
        loss = torch.stack(list(values.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
