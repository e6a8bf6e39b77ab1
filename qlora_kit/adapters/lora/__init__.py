"""LoRA and its variants: LoRA-FA, DoRA, PiSSA, LoftQ, slices of fused linears, embeddings."""
