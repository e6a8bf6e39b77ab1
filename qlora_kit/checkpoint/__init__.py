"""Model folders on disk: found, read and written tensor by tensor, without building a model."""
