"""What is known of accelerators, and the FLOPs that a model asks of them."""
