"""The contrastive losses over a pair of embedding matrices or a matrix of scores; they share one sweep over the logits."""

from .op import InfoNCEStatistics, info_nce, info_nce_from_scores
from .sigmoid import sigmoid_contrastive

__all__ = ["InfoNCEStatistics", "info_nce", "info_nce_from_scores", "sigmoid_contrastive"]
