"""Measurements, each with its record under results/: run after the tests, never instead."""
