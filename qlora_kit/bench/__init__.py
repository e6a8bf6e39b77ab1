"""Benchmarks for users: memory, speed and latency, each measured in processes of its own."""
