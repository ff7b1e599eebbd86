"""Text files of every form, read as documents: for the tokenizer, training and the pipeline."""
