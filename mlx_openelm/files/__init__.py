"""Every replacement of a file or folder of the user; `output` says by which rules."""
