"""Rotary position embeddings, in place: op, reference, CUDA."""
