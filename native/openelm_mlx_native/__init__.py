"""What a network computes on the CPU, vectorised and on all cores: products, attention and norms."""

import mlx.core as _mx

from ._built import mlx_version

if _mx.__version__ != mlx_version:
    raise ImportError(
        f"openelm-mlx-native was built for MLX {mlx_version}, but {_mx.__version__} is installed; install both in the "
        "same version",
        name=__name__,
    )

from ._kernels import (
    add_and_normalize,
    attention,
    gated,
    instructions,
    largest_batch,
    log_sum_exp,
    matmul_transposed,
    normalize_and_rotate,
    quantized_matmul,
    quantized_rows,
    rms_norm,
    set_instructions,
    set_threads,
    threads,
)

__all__ = [
    "add_and_normalize",
    "attention",
    "gated",
    "instructions",
    "largest_batch",
    "log_sum_exp",
    "matmul_transposed",
    "mlx_version",
    "normalize_and_rotate",
    "quantized_matmul",
    "quantized_rows",
    "rms_norm",
    "set_instructions",
    "set_threads",
    "threads",
]
