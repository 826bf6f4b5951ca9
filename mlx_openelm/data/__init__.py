"""From files of texts and records to the rows of a training step."""
