"""Fused kernels for the decoding step on a GPU."""
