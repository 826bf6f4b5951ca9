"""What the network computes in fewer operations than MLX has: fused kernels for a GPU, a native package for the CPU."""
