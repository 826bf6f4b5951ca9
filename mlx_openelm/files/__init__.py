"""Safe replacement of the user's files and folders; the rules are in `output`."""
