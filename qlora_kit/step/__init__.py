"""One training step of a model: its layers prepared, its loss, its CUDA graphs."""
