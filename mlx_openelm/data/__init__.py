"""From files of text and records to the rows of a training step."""
