"""Adapter folders: PEFT's files, our own, and what is translated between them."""
