"""`python -m mlx_openelm` is `openelm-mlx`."""

from .cli import main

main()
