"""The commands of `openelm-mlx`, one file for each group, and what they share."""
