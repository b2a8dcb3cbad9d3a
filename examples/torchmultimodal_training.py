"""A two-tower model with torchmultimodal's contrastive loss, fused, on pictures drawn here: seconds on a CPU.

    python examples/torchmultimodal_training.py [--steps 100] [--batch 16] [--host]

With --host torchmultimodal must be installed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from toy import WORDS, Progress, matched, pictures, words


def main() -> None:
    progress = Progress(__doc__, steps=100, batch=16)
    if progress.host:
        from torchmultimodal.modules.losses.contrastive_loss_with_temperature import (
            ContrastiveLossWithTemperature,
        )
    else:
        from jrl_kernels.integrations.torchmultimodal import ContrastiveLossWithTemperature
    image_encoder = nn.Sequential(
        nn.Conv2d(3, 16, 5, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 32),
    )
    text_encoder = nn.Sequential(nn.EmbeddingBag(len(WORDS), 64), nn.ReLU(), nn.Linear(64, 32))
    loss = ContrastiveLossWithTemperature()
    learned = nn.ModuleList([image_encoder, text_encoder, loss])
    optimizer = torch.optim.AdamW(learned.parameters(), lr=2e-3)
    for step in range(1, progress.steps + 1):
        images, kinds = pictures(progress.batch)
        x, y = image_encoder(images), text_encoder(words(kinds))
        value = loss(F.normalize(x, dim=1), F.normalize(y, dim=1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress(step, value)
    images, kinds = pictures(16)
    with torch.no_grad():
        x, y = image_encoder(images), text_encoder(words(kinds))
    matched(F.normalize(x, dim=1) @ F.normalize(y, dim=1).T)


if __name__ == "__main__":
    main()
