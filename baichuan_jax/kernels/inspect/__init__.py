"""What compilers make of the kernels, without a device: registers, memory, the roofline bound."""
