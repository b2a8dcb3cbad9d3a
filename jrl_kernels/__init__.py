"""Fused ops for joint image-text representation learning. Importing it compiles nothing and touches no GPU."""

from . import distributed
from .cached import cached_step
from .ops.gumbel import Assignment, gumbel_assign, gumbel_embed
from .ops.info_nce import InfoNCEStatistics, info_nce, info_nce_from_scores, sigmoid_contrastive
from .ops.max_sim import max_sim, max_sim_varlen
from .ops.mutual_information import mutual_information
from .ops.partition_nce import noise_log_partition, partition_nce
from .ops.ranking_loss import ranking_loss, ranking_loss_from_scores
from .ops.similarity import agreement_topk, retrieval_ranks, similarity_matrix, similarity_topk
from .ops.word_context import word_context
from .ops.word_region import attention_critic, word_region_scores

__all__ = [
    "Assignment",
    "InfoNCEStatistics",
    "agreement_topk",
    "attention_critic",
    "cached_step",
    "distributed",
    "gumbel_assign",
    "gumbel_embed",
    "info_nce",
    "info_nce_from_scores",
    "max_sim",
    "max_sim_varlen",
    "mutual_information",
    "noise_log_partition",
    "partition_nce",
    "ranking_loss",
    "ranking_loss_from_scores",
    "retrieval_ranks",
    "sigmoid_contrastive",
    "similarity_matrix",
    "similarity_topk",
    "word_context",
    "word_region_scores",
]
