"""Several adapters on one base: switched, combined, and side by side in one batch."""
