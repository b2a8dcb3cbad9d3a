"""Noise-contrastive estimation against a memory bank, with a frozen partition constant."""

from .op import noise_log_partition, partition_nce

__all__ = ["noise_log_partition", "partition_nce"]
