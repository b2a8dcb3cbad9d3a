"""Late interaction: every word picks its best region, every region its best word, for all pairs of images and captions."""

from .op import max_sim
from .varlen import max_sim_varlen

__all__ = ["max_sim", "max_sim_varlen"]
