"""What a person does with a trained GroupViT: the classes of every pixel of pictures, and the score on datasets."""

from jrl.segmentation.classes import Classes
from jrl.segmentation.segment import Options, Segmented, segment

__all__ = ["Classes", "Options", "Segmented", "segment"]
