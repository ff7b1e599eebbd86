"""Faults of a run: how they are noticed, attributed to a host, survived and accounted for."""
