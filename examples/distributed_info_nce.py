"""A training loop of one's own over several processes, checked against one process with the whole batch.

    torchrun --nproc-per-node 2 examples/distributed_info_nce.py

Two encoders and a temperature under DistributedDataParallel, `jrl_kernels.distributed.info_nce` over the pairs of all ranks, in
its gather and its ring form. Runs on CPUs through gloo and, with a GPU for each process, through NCCL.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jrl_kernels import distributed, info_nce

PAIRS, FEATURES, WIDTH, STEPS = 512, 64, 32, 20


class Model(nn.Module):
    """The temperature is a parameter of the wrapped module, so its gradient is averaged like the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.text = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(images), self.text(texts), self.log_scale.exp()


def pairs(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole batch of a step; a text is its image seen through another basis, and noise."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(PAIRS, FEATURES, generator=generator)
    texts = images.flip(1) + 0.5 * torch.randn(PAIRS, FEATURES, generator=generator)
    return images.to(device), texts.to(device)


def train(form: str, device: torch.device) -> tuple[list[float], Model]:
    """Every rank sees its share of the pairs; shares may differ by one."""
    torch.manual_seed(0)
    model = Model().to(device)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        here = slice(dist.get_rank(), None, dist.get_world_size())
        images, texts = (side[here] for side in pairs(step, device))
        x, y, scale = wrapped(images, texts)
        loss = distributed.info_nce(x, y, scale=scale, normalize=True, form=form)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def train_alone(device: torch.device) -> tuple[list[float], Model]:
    """The same in one process."""
    torch.manual_seed(0)
    model = Model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        x, y, scale = model(*pairs(step, device))
        loss = info_nce(x, y, scale=scale, normalize=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def main() -> None:
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # a rank that dies or hangs ends the others after this long
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=5))
    truth, single = train_alone(device)
    for form in ("gather", "ring"):
        losses, model = train(form, device)
        difference = max(
            float((ours - theirs).abs().max().detach())
            for ours, theirs in zip(model.parameters(), single.parameters(), strict=True)
        )
        if dist.get_rank() == 0:
            print(
                f"{form}: {dist.get_world_size()} ranks on {device.type}, loss {losses[0]:.4f} to {losses[-1]:.4f} "
                f"(one process: {truth[-1]:.4f}), weights differ by {difference:.1e}"
            )
        if not difference < 1e-4:
            raise SystemExit(f"{form}: the ranks' weights are not those of one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
