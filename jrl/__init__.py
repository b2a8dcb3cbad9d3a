"""Joint image-text representation learning: systems, data readers, training and evaluation on top of `jrl_kernels`."""
