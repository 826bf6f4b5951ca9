"""Conversion of OpenELM weights in any supported format to an MLX model folder."""
