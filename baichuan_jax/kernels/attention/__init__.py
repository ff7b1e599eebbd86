"""Causal attention: api.py chooses an implementation; each implementation has its own file."""
