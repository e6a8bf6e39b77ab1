"""Scales of an NF4 weight whose rows are stretched: op, reference, CUDA."""
