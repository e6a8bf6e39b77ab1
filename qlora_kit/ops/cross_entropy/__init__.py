"""Cross-entropy of rows of logits, their gradient in place: op, reference, CUDA."""
