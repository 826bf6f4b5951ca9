"""Folders that this package writes."""
