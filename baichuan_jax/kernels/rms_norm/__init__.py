"""RMSNorm with the residual addition: the choice of an implementation, and one file for each."""
