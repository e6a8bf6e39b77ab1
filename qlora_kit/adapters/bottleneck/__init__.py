"""Bottleneck adapters behind sublayers: Houlsby's, Pfeiffer's, Lin's, AdapterDrop."""
