"""Configurations and weights in the forms that others write."""
