"""Errors, units, name patterns, atomic files: what every other room needs, free of torch."""
