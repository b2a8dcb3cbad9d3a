"""Objectives: an op of `jrl_kernels` with the parameters that belong to it."""

from __future__ import annotations

from jrl.objectives.contrastive import ContrastiveObjective, duplicate_text_ids

__all__ = ["ContrastiveObjective", "duplicate_text_ids"]
