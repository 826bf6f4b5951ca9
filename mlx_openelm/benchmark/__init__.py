"""Tokens per second, and what keeps them from being more."""
