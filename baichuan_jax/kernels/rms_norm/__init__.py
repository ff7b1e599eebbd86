"""RMSNorm with the residual addition: api.py chooses; each implementation has its own file."""
