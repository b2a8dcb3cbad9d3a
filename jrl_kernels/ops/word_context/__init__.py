"""Attention of the regions of an image over the words of its caption, as XMC-GAN's generator has it."""

from .op import word_context

__all__ = ["word_context"]
