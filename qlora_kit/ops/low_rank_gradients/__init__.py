"""Gradients of low-rank factors that read the output's gradient: op, reference, CUDA."""
