"""Linear layer on an NF4 weight with the LoRA branch inside: op, reference."""
