"""The version, where packaging and `doctor` can read it without importing MLX."""

__version__ = "0.1.0"
