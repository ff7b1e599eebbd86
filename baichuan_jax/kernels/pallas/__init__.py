"""TPU kernels in Pallas. They compile for a TPU on any machine with libtpu, and run elsewhere only in Pallas's interpreter."""
