"""Late interaction in the call forms of libraries that name the sides queries and documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks, max_sim
from ._softmax import common_dtype


def as_mask(mask: Any) -> Tensor | None:
    """A mask of any type as a boolean one: what is not 0 counts."""
    if mask is None:
        return None
    mask = torch.as_tensor(mask)
    return mask if mask.dtype == torch.bool else mask != 0


def as_tensor(embeddings: Any) -> Tensor:
    """Tensors, arrays, or lists of either of one shape."""
    if isinstance(embeddings, (list, tuple)) and embeddings:
        return torch.stack([torch.as_tensor(item) for item in embeddings])
    return torch.as_tensor(embeddings)


def every_pair(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    mask_mode: str,
    reduce: str = "sum",
) -> Tensor:
    """[Q, T, D], [C, L, D] -> [Q, C]: query tokens pick document tokens."""
    scores = max_sim(
        documents,
        queries,
        region_mask=document_mask,
        word_mask=query_mask,
        mask_mode=mask_mode,
        reduce=reduce,
    )
    return scores.T


def own_candidates(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    mask_mode: str,
) -> Tensor:
    """[Q, T, D], [Q, K, L, D] -> [Q, K]: each query with documents of its own.

    Plain PyTorch, in float32 or wider: similarities exist for these pairs alone, K T L of them a query.
    """
    queries, documents = common_dtype(queries, documents)
    wide = _checks.accumulation(queries.dtype)
    # Padding may hold anything: a product with NaN would reach the gradient through 0 * NaN.
    if query_mask is not None:
        queries = torch.where(query_mask[..., None], queries, 0.0)
    if document_mask is not None:
        documents = torch.where(document_mask[..., None], documents, 0.0)
    with torch.autocast(queries.device.type, enabled=False):
        s = torch.einsum("qtd,qkld->qktl", queries.to(wide), documents.to(wide))
    if s.shape[-1] == 0:
        return s.sum((-1, -2))
    if document_mask is not None and mask_mode == "exclude":
        s = torch.where(document_mask[:, :, None, :], s, -torch.inf)
        counts = document_mask.any(-1)[..., None]
        top = torch.where(counts, s.max(-1).values, 0.0)
    else:
        top = s.max(-1).values
    if query_mask is not None:
        top = torch.where(query_mask[:, None, :], top, 0.0)
    return top.sum(-1)
