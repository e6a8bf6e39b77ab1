"""What a training step will take, before it runs: memory by component, and time."""
