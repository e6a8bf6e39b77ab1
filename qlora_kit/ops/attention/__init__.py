"""Causal self-attention for training, from torch's own kernels."""
