"""One launch of a run, from its first state to its last step."""
