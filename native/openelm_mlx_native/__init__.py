"""MLX's quantized and float32 products on the CPU, vectorised and on all cores."""

import mlx.core as _mx

from ._built import mlx_version

if _mx.__version__ != mlx_version:
    raise ImportError(
        f"openelm-mlx-native was built for MLX {mlx_version}, but {_mx.__version__} is installed; install both in the "
        "same version",
        name=__name__,
    )

from ._kernels import (
    instructions,
    largest_batch,
    matmul_transposed,
    quantized_matmul,
    quantized_rows,
    rms_norm,
    set_instructions,
    set_threads,
    threads,
)

__all__ = [
    "instructions",
    "largest_batch",
    "matmul_transposed",
    "mlx_version",
    "quantized_matmul",
    "quantized_rows",
    "rms_norm",
    "set_instructions",
    "set_threads",
    "threads",
]
