"""LoRA's small product of many rows: s·X·Aᵀ, s·dY·B."""
