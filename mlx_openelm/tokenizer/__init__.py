"""Text to ids and back, and the files that a tokenizer is found in and written to."""
