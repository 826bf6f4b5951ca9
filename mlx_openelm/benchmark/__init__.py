"""Tokens per second, and what limits them."""
