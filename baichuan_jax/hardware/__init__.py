"""What is known of accelerators, and how many FLOPs a model needs of them."""
