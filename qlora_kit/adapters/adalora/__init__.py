"""AdaLoRA: a trained singular value decomposition whose ranks fall to a budget."""
