"""Adapters in the forms of PEFT, mlx-lm and CoreNet."""
