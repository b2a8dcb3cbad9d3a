"""pytorch-metric-learning's label-based NT-Xent, fused, on pictures drawn here: seconds on a CPU.

python examples/metric_learning_training.py [--steps 100] [--batch 48] [--host]
"""

from __future__ import annotations

import torch
from pytorch_metric_learning.losses import NTXentLoss as HostLoss
from torch import nn
from toy import Progress, matched, pictures

from jrl_kernels.integrations.pytorch_metric_learning import NTXentLoss


def main() -> None:
    progress = Progress(__doc__, steps=100, batch=48)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 32),
    )
    loss = HostLoss(temperature=0.2) if progress.host else NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, progress.steps + 1):
        images, kinds = pictures(progress.batch)
        value = loss(model(images), kinds)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress(step, value)
    (first, kinds), (second, others) = pictures(16), pictures(16)
    with torch.no_grad():
        x, y = (nn.functional.normalize(model(images), dim=1) for images in (first, second))
    matched((x @ y.T)[kinds.argsort()][:, others.argsort()])


if __name__ == "__main__":
    main()
