"""Lower bounds of the mutual information of two views, over every pair of images and of locations, never stored."""

from .op import mutual_information

__all__ = ["mutual_information"]
