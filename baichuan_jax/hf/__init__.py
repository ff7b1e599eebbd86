"""Checkpoints of Hugging Face: import and export."""
