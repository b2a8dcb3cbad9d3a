"""What every backend does with the codes that were drawn."""

from __future__ import annotations

from torch import Tensor


def drawn(codebook: Tensor, index: Tensor, log_sum_exp: Tensor) -> Tensor:
    """The entries [N, k, D] at index [N, k]; NaN where a row's softmax is, which its one-hot rows would hide."""
    poison = (log_sum_exp - log_sum_exp).to(codebook.dtype)
    return codebook[index] + poison[:, None, None]
