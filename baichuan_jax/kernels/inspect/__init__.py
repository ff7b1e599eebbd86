"""What the assembler made of a kernel: registers, instructions, the roofline bound."""
