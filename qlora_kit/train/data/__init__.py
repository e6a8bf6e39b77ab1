"""From files of rows to batches of tokens with a loss mask."""
