"""The self-test of a machine: is what it computes right, and how fast is it? `openelm-mlx doctor` runs it."""
