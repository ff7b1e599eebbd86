"""GPU kernels in the Triton language, called through jax-triton. Import these modules only where triton is installed."""
