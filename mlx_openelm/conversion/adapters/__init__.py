"""Adapters in the formats of PEFT, mlx-lm and CoreNet."""
