"""Readers for configurations and weights that other software writes."""
