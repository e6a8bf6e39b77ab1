"""Data, trainer, evaluation and the run report."""
