"""Coding a weight as NF4, and its scales in 8 bits: op, reference, CUDA."""
