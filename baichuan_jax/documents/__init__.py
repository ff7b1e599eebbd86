"""Text files of every form, read as documents: for the tokenizer, for training and for the corpus pipeline."""
