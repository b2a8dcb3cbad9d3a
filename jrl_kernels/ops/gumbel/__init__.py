"""Discrete choices with Gumbel noise and a straight-through gradient: tokens to groups, and entries of a codebook."""

from .embed import gumbel_embed
from .op import Assignment, gumbel_assign

__all__ = ["Assignment", "gumbel_assign", "gumbel_embed"]
