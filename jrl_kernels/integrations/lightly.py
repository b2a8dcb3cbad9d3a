"""A look-alike of lightly's `NTXentLoss`. lightly itself is not imported.

from jrl_kernels.integrations.lightly import NTXentLoss     # was: from lightly.loss import NTXentLoss
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import info_nce
from ..distributed import raise_together
from ..distributed.losses import differentiated
from ..distributed.ranks import Ranks, gather_rows
from ._softmax import common_dtype, log_sum_exp, row_dots

__all__ = ["NTXentLoss"]


class NTXentLoss(nn.Module):
    """NT-Xent between two views of a batch, or MoCo's loss against a memory bank.

        loss = the mean over the 2B views i of LSE_{j != i} s_ij - s_i,partner(i)            memory_bank_size=0
        loss = the mean over rows i of softplus(LSE_{j in bank} s_ij - s_i,partner(i))       with a memory bank

    where s_ij = cos(z_i, z_j) / temperature. Chen et al. 2020 (SimCLR); He et al. 2020 (MoCo). The rows are normalised inside.

    Args:
        temperature: divides the cosines.
        memory_bank_size: 0, or (entries, width) of a queue of earlier out1, which then are the only negatives. It is filled and
            moved on as lightly's: when the last entries are written the rest of that batch is dropped.
        gather_distributed: the other ranks' views are negatives too, and a memory bank takes those of all ranks.

    Raises:
        ValueError: a temperature of 0, a bank without a width, gather_distributed without torch.distributed.

    Gradients: out0, out1. Across ranks gathered views carry gradients, and the loss is this rank's share of the whole: its
    rows' sum times the number of ranks over the rows of all. After DDP's average loss and gradients are those of one process
    with the whole batch, whatever the ranks' numbers of rows.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if abs(temperature) < 1e-8:
            raise ValueError(f"NTXentLoss: temperature must not be 0, got {temperature!r}")
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size != (0,) and (len(size) != 2 or min(size) < 0):
            raise ValueError(
                f"NTXentLoss: memory_bank_size must be 0 or (entries, width), got {memory_bank_size!r}"
            )
        if gather_distributed and not dist.is_available():
            raise ValueError("NTXentLoss: gather_distributed needs a PyTorch with torch.distributed")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        bank = F.normalize(torch.randn(size), dim=-1) if len(size) == 2 else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [B, D], row i with row i: a 0-d tensor.

        Raises:
            ValueError: views of different shapes; ranks that differ in width, dtype, bank or in which views have gradients. On
                every rank.
        """
        several = self.gather_distributed and dist.is_initialized() and dist.get_world_size() > 1
        with raise_together(out0, out1, alone=not several):
            if out0.shape != out1.shape:
                raise ValueError(
                    f"NTXentLoss: out0 and out1 must have the same shape, got {list(out0.shape)} and {list(out1.shape)}"
                )
            update = out0.requires_grad
            out0, out1 = common_dtype(F.normalize(out0, dim=1), F.normalize(out1, dim=1))
        ranks = None
        if several:
            agreed = self.bank.shape, update, differentiated(out0), differentiated(out1)
            ranks = Ranks("NTXentLoss", out0, agreed, None, even=False)
        if self.bank.numel() == 0:
            return self._between_views(out0, out1, ranks)
        bank = self.bank.to(out0.dtype)  # as it was before this batch
        negatives = log_sum_exp(
            out0,
            bank.clone() if bank is self.bank else bank,
            torch.zeros(out0.shape[0], dtype=torch.int64, device=out0.device),
            scale=1 / self.temperature,
        )
        if update:
            self._enqueue(out1.detach() if ranks is None else ranks.gather(out1.detach()))
        losses = -F.logsigmoid(row_dots(out0, out1) / self.temperature - negatives)
        return losses.mean() if ranks is None else losses.sum() * (ranks.size / max(ranks.total, 1))

    def _between_views(self, out0: Tensor, out1: Tensor, ranks: Ranks | None) -> Tensor:
        all0, all1 = (out0, out1) if ranks is None else (gather_rows(out0, ranks), gather_rows(out1, ranks))
        offset, total = (0, out0.shape[0]) if ranks is None else (ranks.offset, ranks.total)
        own = torch.arange(out0.shape[0], device=out0.device) + offset
        ids = torch.arange(2 * total, device=out0.device)
        loss: Tensor = info_nce(
            torch.cat([out0, out1]),
            torch.cat([all0, all1]),
            scale=1 / self.temperature,
            positives=torch.cat([own + total, own]),
            exclude=(torch.cat([own, own + total]), ids),  # a view with itself
            direction="x_to_y",
            reduction="mean" if ranks is None else "sum",
        )
        return loss if ranks is None else loss * (ranks.size / max(2 * ranks.total, 1))

    @torch.no_grad()
    def _enqueue(self, rows: Tensor) -> None:
        start, entries = int(self.bank_ptr), self.bank.shape[0]
        end = start + rows.shape[0]
        self.bank[start:end] = rows[: entries - start].to(self.bank.dtype)
        self.bank_ptr.fill_(0 if end >= entries else end)
