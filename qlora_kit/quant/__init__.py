"""The NF4 codec, double quantization and the bytes they are stored as: the only definition."""
