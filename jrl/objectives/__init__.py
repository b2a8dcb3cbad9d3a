"""Objectives: an op of `jrl_kernels` with the parameters that belong to it."""

from __future__ import annotations

from jrl.objectives.attention_critic import AttentionCritic
from jrl.objectives.contrastive import ContrastiveObjective, duplicate_text_ids
from jrl.objectives.deep_infomax import DeepInfoMax, MutualInformationNet, deep_infomax_loss
from jrl.objectives.masked_words import MaskedWords
from jrl.objectives.mutual_information import MutualInformationEstimator

__all__ = [
    "AttentionCritic",
    "ContrastiveObjective",
    "DeepInfoMax",
    "MaskedWords",
    "MutualInformationEstimator",
    "MutualInformationNet",
    "deep_infomax_loss",
    "duplicate_text_ids",
]
