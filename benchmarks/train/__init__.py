"""The training step, ours and the peers': speed, memory, and whether the loss is the same."""
