"""Causal attention: the choice of an implementation, and one file for each."""
