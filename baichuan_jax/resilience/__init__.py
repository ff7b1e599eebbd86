"""Faults: exit codes that mean something, and signals that ask a run to stop."""
