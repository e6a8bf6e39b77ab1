"""From a path or hub id to a model on a 4-bit base."""
