"""Similarities of all pairs: as a matrix, or as the neighbours, ranks and agreements that can be read off it, unstored."""

from .matrix import similarity_matrix
from .op import agreement_topk, retrieval_ranks, similarity_topk

__all__ = ["agreement_topk", "retrieval_ranks", "similarity_matrix", "similarity_topk"]
