"""Ahead-of-time compilation of the training step for a topology, and the prediction of its time."""
