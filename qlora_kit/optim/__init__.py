"""Optimizers on flat buffers: gradients, clipping, AdamW in 32 and 8 bits, paged or not."""
