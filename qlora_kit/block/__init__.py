"""Decoder layers of the Llama-like family as one step of autograd with a chosen saved set."""
