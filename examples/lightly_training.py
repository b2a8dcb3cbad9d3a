"""SimCLR with lightly's projection head and the fused NT-Xent, on pictures drawn here: seconds on a CPU.

python examples/lightly_training.py [--steps 100] [--batch 32] [--host]
"""

from __future__ import annotations

import torch
from lightly.loss import NTXentLoss as HostLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn
from toy import Progress, matched, pictures

from jrl_kernels.integrations.lightly import NTXentLoss


def view(images: Tensor) -> Tensor:
    """Shifted, mirrored or not, and noisy."""
    shift = [int(s) for s in torch.randint(-3, 4, (2,))]
    moved = images.roll(shift, (2, 3))
    return (moved.flip(3) if torch.rand(()) < 0.5 else moved) + 0.2 * torch.randn_like(images)


def main() -> None:
    progress = Progress(__doc__, steps=100, batch=32)
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(64)
    )
    model = nn.Sequential(backbone, SimCLRProjectionHead(64, 64, 32))
    model(pictures(2)[0])  # the lazy layer learns its size
    loss = HostLoss(temperature=0.2) if progress.host else NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, progress.steps + 1):
        images, _ = pictures(progress.batch)
        value = loss(model(view(images)), model(view(images)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress(step, value)
    images, _ = pictures(16)
    with torch.no_grad():
        first, second = (nn.functional.normalize(model.eval()(view(images)), dim=1) for _ in range(2))
    matched(first @ second.T)


if __name__ == "__main__":
    main()
