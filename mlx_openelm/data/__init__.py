"""From text files and record files to the rows of a training step."""
