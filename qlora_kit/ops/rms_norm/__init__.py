"""Root-mean-square normalization of rows: op, reference, CUDA."""
