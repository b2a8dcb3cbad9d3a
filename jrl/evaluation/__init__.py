"""Evaluation: retrieval, zero-shot classification, the InfoNCE bound."""

from __future__ import annotations

from jrl.evaluation.report import evaluate, info_nce_bound, to_markdown
from jrl.evaluation.retrieval import RetrievalRanks, chance_recall, retrieval_metrics, retrieval_ranks
from jrl.evaluation.zero_shot import zero_shot_accuracy

__all__ = [
    "RetrievalRanks",
    "chance_recall",
    "evaluate",
    "info_nce_bound",
    "retrieval_metrics",
    "retrieval_ranks",
    "to_markdown",
    "zero_shot_accuracy",
]
