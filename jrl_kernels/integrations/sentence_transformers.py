"""sentence-transformers' ranking losses without their matrices of scores.

    from jrl_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss
    trainer = SentenceTransformerTrainer(model, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))

`MultipleNegativesRankingLoss`, `CachedMultipleNegativesRankingLoss` and `CachedGISTEmbedLoss` are subclasses of those of
sentence-transformers 6.2, with their arguments. For multi-vector models `colbert_scores` and `mean_colbert_scores` are a
`similarity_fct`:

    MultiVectorMultipleNegativesRankingLoss(model, similarity_fct=colbert_scores)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank
except ImportError as error:
    raise ImportError(
        "jrl_kernels.integrations.sentence_transformers needs it: pip install 'sentence-transformers>=6.2'"
    ) from error

from .. import _checks
from ._late_interaction import as_mask, as_tensor, every_pair
from ._ranking import Ranking, guided_loss, ranking_loss

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "MultipleNegativesRankingLoss",
    "colbert_scores",
    "mean_colbert_scores",
]

# As sentence-transformers scores a document that has no token: below every other, and finite.
EMPTY_DOCUMENT = -1e9


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """InfoNCE of queries with documents and hard negatives, in any of the host's directions, partitions and hardness modes.

    With a query's own positive s_i, `directions` says which of the similarities query-document, query-query, document-query and
    document-document share the softmax with it, `partition_mode` whether in one or in one each, `hardness_mode` which negatives
    get hardness_strength * sim more, without gradient. At most two sweeps, one for the rows of queries and one for those of
    documents; nothing of size B x N is stored.

    Arguments, returns and errors are the host's. Any `similarity_fct` but `cos_sim` and `dot_score` is left to the host.

    Gradients: the embeddings. With `gather_across_devices` the loss is of this rank's rows, and gathered embeddings carry
    gradients, as in the host.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        if self.similarity_fct not in (cos_sim, dot_score):
            found: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return found
        if len(embeddings) < 2:
            raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
        return _ranking_loss(self, list(embeddings))


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` with the host's gradient caching: the loss over the whole batch is one call, not a loop over
    mini-batches of rows. Arguments, returns and errors are the host's."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        if self.similarity_fct not in (cos_sim, dot_score):
            found: Tensor = super().calculate_loss(reps, labels, with_backward=with_backward)
            return found
        loss = _ranking_loss(self.loss, [torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


class CachedGISTEmbedLoss(losses.CachedGISTEmbedLoss):
    """InfoNCE whose negatives a guide model sifts, with the host's gradient caching.

    A pair leaves the softmax where the guide finds it more similar than the positive less `margin`. Which pairs those are
    follows from a second similarity matrix, so no fused loss knows them; rows are taken `mini_batch_size` at a time as in the
    host, but by matrix products of unit rows, where the host broadcasts [rows, N, D]. Arguments, returns and errors are the
    host's.
    """

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        reps_guided: list[list[Tensor]],
        *,
        with_backward: bool = False,
    ) -> Tensor:
        if len(reps) != len(reps_guided):
            raise ValueError("reps and reps_guided must have the same length")
        columns = [F.normalize(torch.cat(r), dim=-1) for r in reps]
        guides = [F.normalize(torch.cat(r), dim=-1) for r in reps_guided]
        rank = 0
        if self.gather_across_devices:
            columns[1:] = [all_gather_with_grad(column) for column in columns[1:]]
            guides[1:] = [all_gather_with_grad(guide) for guide in guides[1:]]
            rank = get_rank()
        relative = self.margin_strategy == "relative"
        return guided_loss(
            columns,
            guides,
            first=rank * columns[0].shape[0],
            temperature=self.temperature,
            margin=(0.0, self.margin) if relative else (self.margin, 0.0),
            anchors=self.contrast_anchors,
            positives=self.contrast_positives,
            rows=self.mini_batch_size,
            with_backward=with_backward,
        )


def colbert_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
) -> Tensor:
    """MaxSim of every query with every document of every group, a `similarity_fct` for the multi-vector losses.

    Args:
        queries_embeddings: [Q, T, D].
        documents_embeddings: [C, N, L, D], N documents for each of C queries.
        queries_mask: [Q, T], documents_mask: [C, N, L]; tokens whose mask is 0 do not count. Without a mask, tokens that are all
            zero do not, as in the host.
        chunk_elements: the host's budget of memory; accepted, no tensor of token similarities is made.
        length_normalize: divide by the number of a query's tokens.

    Returns:
        float32 (float64) scores [Q, C N]; document n of group c is column c N + n. One without tokens scores -1e9, as there.

    Gradients: queries_embeddings, documents_embeddings; once differentiable.
    """
    queries, documents = as_tensor(queries_embeddings), as_tensor(documents_embeddings).flatten(0, 1)
    query_mask = as_mask(queries_mask)
    if documents_mask is None:
        document_mask = documents.any(-1)
    else:
        document_mask = torch.as_tensor(documents_mask).flatten(0, 1) != 0
    if query_mask is None:
        query_mask = queries.any(-1)
    reduce = "mean" if length_normalize else "sum"
    scores = every_pair(queries, documents, query_mask, document_mask, "exclude", reduce)
    return scores.masked_fill(~document_mask.any(-1), EMPTY_DOCUMENT)


def mean_colbert_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = True,
) -> Tensor:
    """`colbert_scores` divided by the number of each query's tokens."""
    return colbert_scores(
        queries_embeddings,
        documents_embeddings,
        queries_mask,
        documents_mask,
        chunk_elements,
        length_normalize,
    )


def _ranking_loss(host: Any, columns: list[Tensor]) -> Tensor:
    settings = Ranking(
        scale=host.scale,
        directions=host.directions,
        partition=host.partition_mode,
        hardness=host.hardness_mode if host.hardness_strength > 0.0 else None,
        strength=host.hardness_strength,
    )
    # as the host's similarities, whose norms and products are float32's
    columns = [column.to(_checks.accumulation(column.dtype)) for column in columns]
    if host.similarity_fct is cos_sim:
        columns = [F.normalize(column, dim=-1) for column in columns]
    local = columns
    rank = 0
    if host.gather_across_devices:
        columns = [all_gather_with_grad(column) for column in columns]
        rank = get_rank()
    return ranking_loss(local[:2], columns, rank * local[0].shape[0], settings)
