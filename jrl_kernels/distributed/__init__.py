"""The contrastive losses over the batches of all ranks of a torch.distributed process group."""

from .agreement import raise_together
from .critics import max_sim, word_region_scores
from .losses import info_nce, info_nce_from_scores
from .ranks import gather, mean
from .sigmoid import sigmoid_contrastive

__all__ = [
    "gather",
    "info_nce",
    "info_nce_from_scores",
    "max_sim",
    "mean",
    "raise_together",
    "sigmoid_contrastive",
    "word_region_scores",
]
