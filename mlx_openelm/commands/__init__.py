"""The commands of `openelm-mlx`, one file per group, and the code they share."""
