"""Prefix-tuning and prompt-tuning: trained positions that have no token."""
