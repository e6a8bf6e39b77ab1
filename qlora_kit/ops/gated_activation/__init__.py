"""act(gate) · up, and its gradient: op, reference, CUDA."""
