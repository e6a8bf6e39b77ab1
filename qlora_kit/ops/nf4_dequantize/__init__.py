"""Decoding an NF4 weight to a float dtype: op, reference, CUDA."""
