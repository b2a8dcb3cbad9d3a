"""Fused ops for joint image-text representation learning. Importing it compiles nothing and touches no GPU."""

from .ops.info_nce import InfoNCEStatistics, info_nce, info_nce_from_scores, sigmoid_contrastive

__all__ = ["InfoNCEStatistics", "info_nce", "info_nce_from_scores", "sigmoid_contrastive"]
