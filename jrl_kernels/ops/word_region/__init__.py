"""Word-region attention of every image with every caption: one op whose settings are the critics of many systems."""

from .op import attention_critic, word_region_scores

__all__ = ["attention_critic", "word_region_scores"]
