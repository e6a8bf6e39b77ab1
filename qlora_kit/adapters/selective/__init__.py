"""Selective methods train the model's own weights: biases (BitFit), last blocks, or all."""
