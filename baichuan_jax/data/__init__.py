"""From text to global batches of tokens."""
