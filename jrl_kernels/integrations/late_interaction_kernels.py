"""The calls of late-interaction-kernels, through `max_sim`: `maxsim`, `maxsim_pairs`, `maxsim_varlen`. It is not imported.

    from jrl_kernels.integrations.late_interaction_kernels import maxsim

Masked document tokens are never picked and a document without tokens scores 0, as there. They run on CPUs too.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import max_sim_varlen
from ._late_interaction import as_mask, every_pair, own_candidates

__all__ = ["maxsim", "maxsim_pairs", "maxsim_varlen"]

BACKWARDS = (None, "auto", "unified", "lowmem")


def maxsim(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    backward: str | None = None,
) -> Tensor:
    """MaxSim of queries with documents: sum over query tokens of the largest product with a document token.

    Args:
        Q: [Nq, Lq, d] or [Lq, d].
        D: [Ld, d], [Nd, Ld, d] for every pair, or [Nq, K, Ld, d] for candidates of each query's own.
        q_mask, d_mask: True for tokens that count; axes as those of Q and D.
        normalize: divide every token by its Euclidean norm first.
        backward: late-interaction-kernels' strategy, "auto", "unified" or "lowmem"; accepted. There is one backward,
            deterministic and summed in float32.

    Returns:
        float32 (float64) scores: [Nq, Nd] or [Nq, K], without the axis of a side that was given as one sequence.

    Raises:
        ValueError: another backward; shapes that do not fit.

    Gradients: Q, D; once differentiable.
    """
    if backward not in BACKWARDS:
        raise ValueError(f"maxsim: backward must be one of {list(BACKWARDS)}, got {backward!r}")
    if Q.dim() not in (2, 3) or D.dim() not in (2, 3, 4):
        raise ValueError(
            f"maxsim: Q must have 2 or 3 axes and D 2, 3 or 4, got {list(Q.shape)} and {list(D.shape)}"
        )
    if normalize:
        Q, D = F.normalize(Q, dim=-1), F.normalize(D, dim=-1)
    single_query, single_document = Q.dim() == 2, D.dim() == 2
    if single_query:
        Q = Q[None]
        q_mask = None if q_mask is None else q_mask.reshape(1, -1)
    if single_document:
        D = D[None]
        d_mask = None if d_mask is None else d_mask.reshape(1, -1)
    if D.dim() == 4:
        if D.shape[0] != Q.shape[0]:
            raise ValueError(
                f"maxsim: D [Nq, K, Ld, d] needs a list of documents for each of {Q.shape[0]} queries, got {list(D.shape)}"
            )
        scores = own_candidates(Q, D, as_mask(q_mask), as_mask(d_mask), "exclude")
    else:
        scores = every_pair(Q, D, as_mask(q_mask), as_mask(d_mask), "exclude")
    if single_document:
        scores = scores[:, 0]
    return scores[0] if single_query else scores


def maxsim_pairs(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    backward: str | None = None,
) -> Tensor:
    """MaxSim of query i with document i: [B, Lq, d], [B, Ld, d] -> [B]. Arguments: as `maxsim`.

    Raises: ValueError unless both have three axes and the same number of rows.
    """
    if Q.dim() != 3 or D.dim() != 3 or Q.shape[0] != D.shape[0]:
        raise ValueError(
            f"maxsim_pairs: Q and D must be [B, L, d] with one B, got {list(Q.shape)} and {list(D.shape)}"
        )
    mask = None if d_mask is None else d_mask[:, None]
    return maxsim(Q, D[:, None], q_mask, mask, normalize=normalize, backward=backward)[:, 0]


def maxsim_varlen(
    Q_packed: Tensor,
    D_packed: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_d: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_d: int | None = None,
) -> Tensor:
    """MaxSim of every query with every document, both packed without padding.

    Args:
        Q_packed: [sum of Lq, d]; query i is rows cu_seqlens_q[i] to cu_seqlens_q[i + 1].
        D_packed: [sum of Ld, d], likewise.
        cu_seqlens_q, cu_seqlens_d: int32 or int64 [sequences + 1].
        max_seqlen_q, max_seqlen_d: lengths of the longest sequences, or more; see `jrl_kernels.max_sim_varlen`.

    Returns:
        float32 (float64) scores [Nq, Nd]; an empty sequence scores 0.

    Raises, Gradients: as `jrl_kernels.max_sim_varlen`.
    """
    scores = max_sim_varlen(
        D_packed,
        Q_packed,
        cu_seqlens_d,
        cu_seqlens_q,
        max_seqlen_regions=max_seqlen_d,
        max_seqlen_words=max_seqlen_q,
    )
    return scores.T
