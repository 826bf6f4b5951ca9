"""Text to ids and back, and the files that tokenizers are read from and written to."""
