"""XMC-GAN's losses on two ranks equal those of one process with the whole batch, gradients included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from jrl.objectives.generation import pair_contrastive, word_contrastive
from tests.ops.conformance import det

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
ROWS = ((0, 3), (3, 5))
"""First and last row of each rank: batches differ in size, and so do the longest captions."""
LENGTHS = torch.tensor([4, 2, 3, 6, 5])


def losses(rows: slice) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Both losses, what they say besides, and their gradients of two encoders, in float64."""
    image, text = (nn.Parameter(det(5, 4, a=a)) for a in (0.11, 0.23))
    longest = int(LENGTHS[rows].max())
    regions = det(5, 7, 5, a=0.37)[rows] @ image
    words = det(5, 6, 5, a=0.53)[rows, :longest] @ text
    mask = torch.arange(longest) < LENGTHS[rows, None]
    found = [
        pair_contrastive(regions.mean(1), words[:, 0], backend="cpu"),
        word_contrastive(regions, words, mask, scale=10.0, backend="cpu"),
        pair_contrastive(regions.mean(1), words[:, 0], directions="one", backend="cpu"),
    ]
    values = [loss for loss, _ in found]
    grads = [g for loss in values for g in torch.autograd.grad(loss, [image, text], retain_graph=True)]
    return [v.detach() for v in values], [s for _, stats in found for s in stats.values()], grads


def rank_main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    values, stats, grads = losses(slice(*ROWS[rank]))
    for grad in grads:
        dist.all_reduce(grad)
        grad /= 2
    torch.save((values, stats, grads), Path(out, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    truth = losses(slice(0, 5))
    mp.spawn(rank_main, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, check_dtype=False)
