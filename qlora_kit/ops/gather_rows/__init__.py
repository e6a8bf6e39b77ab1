"""Rows of a table by their numbers, from host memory too: op, reference, CUDA."""
