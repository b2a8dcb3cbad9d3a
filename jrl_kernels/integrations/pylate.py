"""PyLate's scores through `max_sim`. PyLate itself is not imported.

    from jrl_kernels.integrations.pylate import ColBERTScores
    loss = pylate.losses.Contrastive(model, score_metric=ColBERTScores())

PyLate multiplies the similarities of masked document tokens by 0, so that such a token wins over negative ones:
`masked_documents="zero"`, the default. `"exclude"` never picks them, as filling them with the minimum does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks
from ._late_interaction import as_mask, as_tensor, every_pair, own_candidates

__all__ = ["ColBERTScores", "colbert_kd_scores", "colbert_scores", "colbert_scores_pairwise"]

MASKED = ("zero", "exclude")
BACKENDS = (None, "auto", "torch", "flash", "lik")


def colbert_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
    *,
    masked_documents: str = "zero",
) -> Tensor:
    """ColBERT's scores of every query with every document; no tensor of token similarities is stored.

        score_qc = sum_t m_qt max_l q_t . d_cl

    Khattab & Zaharia 2020, as PyLate's `colbert_scores`.

    Args:
        queries_embeddings: [Q, T, D].
        documents_embeddings: [C, L, D].
        queries_mask: [Q, T]; tokens whose mask is 0 add nothing. Booleans or numbers, of which only 0 and not 0 are told apart.
        documents_mask: [C, L], likewise.
        backend: PyLate's choice among other kernels; accepted.
        masked_documents: "zero" (PyLate: a masked token has similarity 0) or "exclude" (it is never picked).

    Returns:
        float32 (float64) scores [Q, C].

    Raises: ValueError for another masked_documents or backend; else as `jrl_kernels.max_sim`.

    Gradients: queries_embeddings, documents_embeddings; once differentiable.
    """
    _check("colbert_scores", backend, masked_documents)
    return every_pair(
        as_tensor(queries_embeddings),
        as_tensor(documents_embeddings),
        as_mask(queries_mask),
        as_mask(documents_mask),
        masked_documents,
    )


class ColBERTScores:
    """A `score_metric` for PyLate's `Contrastive` and `CachedContrastive`.

    Args:
        masked_documents: as in `colbert_scores`.

    Called with queries [Q, T, D] and the stacked documents [C, N, L, D] of PyLate 1.6 it returns [Q, C N], document n of group c
    in column c N + n; with documents [C, L, D], as for `colbert_scores`, [Q, C].
    """

    def __init__(self, masked_documents: str = "zero") -> None:
        _check("ColBERTScores", None, masked_documents)
        self.masked_documents = masked_documents

    def __call__(
        self,
        queries_embeddings: Any,
        documents_embeddings: Any,
        queries_mask: Any = None,
        documents_mask: Any = None,
        backend: str | None = None,
    ) -> Tensor:
        documents = as_tensor(documents_embeddings)
        mask = as_mask(documents_mask)
        if documents.dim() == 4:
            documents = documents.flatten(0, 1)
            mask = None if mask is None else mask.flatten(0, 1)
        return colbert_scores(
            queries_embeddings, documents, queries_mask, mask, backend, masked_documents=self.masked_documents
        )


def colbert_kd_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
    *,
    masked_documents: str = "zero",
) -> Tensor:
    """Scores [Q, K] of queries [Q, T, D] with candidates of their own [Q, K, L, D], for PyLate's `Distillation`.

    The other arguments are those of `colbert_scores`. The pairs are few: plain PyTorch computes them, T L similarities each.
    """
    _check("colbert_kd_scores", backend, masked_documents)
    return own_candidates(
        as_tensor(queries_embeddings),
        as_tensor(documents_embeddings),
        as_mask(queries_mask),
        as_mask(documents_mask),
        masked_documents,
    )


def colbert_scores_pairwise(
    queries_embeddings: Tensor, documents_embeddings: Tensor, backend: str | None = None
) -> Tensor:
    """Scores [B] of query i [B, T, D] with document i [B, L, D]."""
    return colbert_kd_scores(queries_embeddings, as_tensor(documents_embeddings)[:, None], backend=backend)[
        :, 0
    ]


def _check(op: str, backend: str | None, masked_documents: str) -> None:
    _checks.choice(op, "masked_documents", masked_documents, MASKED)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of PyLate's {list(BACKENDS)}, got {backend!r}")
