"""Operators with several implementations: a folder for each operator."""
