"""Sums of a ⊙ b over rows: op, reference, CUDA."""
