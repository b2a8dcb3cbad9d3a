"""pytorch-metric-learning's `NTXentLoss` without its matrices of pairs.

from jrl_kernels.integrations.pytorch_metric_learning import NTXentLoss
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
except ImportError as error:
    raise ImportError(
        "jrl_kernels.integrations.pytorch_metric_learning needs it: pip install 'pytorch-metric-learning>=2.5'"
    ) from error

from .._positives import group
from ._softmax import common_dtype, log_sum_exp, pair_dots

__all__ = ["NTXentLoss"]


class NTXentLoss(losses.NTXentLoss):
    """NT-Xent with labels: every pair of equal labels is a positive, its other positives are no negatives.

        loss_ip = softplus(LSE_{n: label_n != label_i} s_in - s_ip),  s = cos / temperature

    averaged over the positive pairs (i, p). Chen et al. 2020, as pytorch-metric-learning spells it. It holds a similarity for
    each pair and, for each positive pair, a row of all negative pairs; here the negatives' sum is one sweep over rows and
    columns, and only the positive pairs are listed.

    It is a subclass, so that reducers, regularisers, miners, `CrossBatchMemory` and `SelfSupervisedLoss` work as ever. Arguments:
    those of the host's. A distance that is neither CosineSimilarity nor DotProductSimilarity is left to the host.

    Pairs or triplets from a miner (`indices_tuple`) are used as listed, in memory proportional to their number.

    Gradients: embeddings, ref_emb.
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> Any:
        if type(self.distance) not in (CosineSimilarity, DotProductSimilarity) or self.distance.power != 1:
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if indices_tuple is None and labels is None:
            raise ValueError("NTXentLoss: labels and indices_tuple cannot both be None")
        same = ref_emb is embeddings
        x = self.distance.maybe_normalize(embeddings)
        y = x if same else self.distance.maybe_normalize(ref_emb)
        self.distance.reset_stats()
        self.distance.set_default_stats(embeddings, ref_emb, x, y)
        x, y = common_dtype(x, y)
        scale = 1 / self.temperature
        if indices_tuple is None:
            rows, columns = equal_pairs(labels, ref_labels, without_self=ref_labels is labels)
            negatives = _negatives_by_label(x, y, labels, ref_labels, scale)
        else:
            rows, columns, negative_rows, negative_columns = _listed(indices_tuple)
            logits = scale * pair_dots(x, y, negative_rows, negative_columns)
            negatives = _log_sum_exp_by_row(logits, negative_rows, x.shape[0])
        if rows.numel() == 0 or negatives is None:
            return self.zero_losses()
        logits = scale * pair_dots(x, y, rows, columns)
        return {
            "loss": {
                "losses": -F.logsigmoid(logits - negatives[rows]),
                "indices": (rows, columns),
                "reduction_type": "pos_pair",
            }
        }


def equal_pairs(labels: Tensor, others: Tensor, without_self: bool) -> tuple[Tensor, Tensor]:
    """Indices (i, j) of equal labels, in order of i; nothing of size M x N is made."""
    ordered, order = others.sort(stable=True)
    first, last = torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)
    counts = last - first
    rows = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    place = torch.arange(rows.numel(), device=rows.device) - starts[rows]
    columns = order[first[rows] + place]
    if without_self:
        keep = rows != columns
        rows, columns = rows[keep], columns[keep]
    return rows, columns


def _negatives_by_label(
    x: Tensor, y: Tensor, labels: Tensor, ref_labels: Tensor, scale: float
) -> Tensor | None:
    """log of the sum over the columns of another label, [M]; None where no row has one."""
    differs = labels != ref_labels[:1]
    # Some column of another label: the first one, or the first that differs from it.
    other = (ref_labels != ref_labels[:1]).to(torch.int64).argmax()
    member = torch.where(differs, 0, other)
    some = ref_labels[member] != labels
    if not bool(some.any()):
        return None
    # Labels may be of any type; ids are int64.
    ids = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)[1]
    exclude = ids[: labels.shape[0]], ids[labels.shape[0] :]
    found = log_sum_exp(x, y, member, scale=scale, exclude=exclude)
    return torch.where(some, found, -torch.inf)


def _listed(indices_tuple: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if len(indices_tuple) == 3:  # triplets
        anchors, positives, negatives = indices_tuple
        return anchors, positives, anchors, negatives
    rows, columns, negative_rows, negative_columns = indices_tuple
    return rows, columns, negative_rows, negative_columns


def _log_sum_exp_by_row(logits: Tensor, rows: Tensor, count: int) -> Tensor | None:
    """log of the sum of exp(logits) of the pairs of each row, [count]; -inf for a row without any."""
    if rows.numel() == 0:
        return None
    groups = group(rows, count, in_order=False)
    top = groups.reduce(logits.detach(), "max")
    finite = torch.where(top.isinf(), 0.0, top)
    total = groups.reduce((logits - finite[groups.key]).exp(), "sum")
    some = total > 0
    return torch.where(some, finite + torch.where(some, total, 1.0).log(), -torch.inf)
