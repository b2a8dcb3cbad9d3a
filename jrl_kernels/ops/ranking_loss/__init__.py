"""The hinge losses over a pair of embedding matrices or a matrix of scores."""

from .op import ranking_loss, ranking_loss_from_scores

__all__ = ["ranking_loss", "ranking_loss_from_scores"]
