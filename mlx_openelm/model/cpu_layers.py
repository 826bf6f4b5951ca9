"""Layers for the CPU, where MLX multiplies quantized matrices on one core and, on Linux, without vector instructions.

With the package `openelm-mlx-native`, its kernels compute all products in float32. Without it, the rows of a quantized
matrix are divided among the cores, with one stream per core. For many inputs at once, as in prefill, the rows are
dequantized first: BLAS more than makes up for that. The results are those of MLX's own layers.
"""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from ..kernels.cpu import rms_norm
from ..machine.device import compute_streams, has_fast_matmul
from ..machine.native import native_activations, native_kernels
from ..quantization import Quantization

_SMALLEST_SHARE = 1 << 17  # weights per core; with fewer, waking up a core takes longer than the work
_LARGEST_UNPACKED = 3 << 17  # weights dequantized per core at a time; a whole matrix might need more than the model
_MANY_INPUTS = {2: 12, 3: 17, 4: 8, 5: 21, 6: 29, 8: 7}  # inputs from which dequantizing for BLAS pays off, by bits
_MANY_INPUTS_SLOW = 16  # the least, if BLAS uses no vector instructions


class CPUQuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear` for the CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., input) to (..., output)."""
        return _multiply(self, x)


class CPUQuantizedEmbedding(nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding` for the CPU; its vectors have the dtype that the network computes in.

    MLX's own layer returns bfloat16 in the floating-point modes, whose scales do not tell the original dtype.
    """

    def __init__(self, rows: int, columns: int, dtype: mx.Dtype, **options: Any):
        super().__init__(rows, columns, **options)
        self._dtype = dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        """Ids (...) to vectors (..., M)."""
        kernels = native_kernels()
        if kernels is not None and self._dtype == mx.float32:
            return kernels.quantized_rows(tokens, *_parts(self), **_packing(self))
        biases = self["biases"][tokens] if "biases" in self else None
        options = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return mx.dequantize(self.weight[tokens], self.scales[tokens], biases, **options, dtype=self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states (..., M) to logits (..., V)."""
        return _multiply(self, x)


class CPULinear(nn.Linear):
    """`nn.Linear` for the CPU with the kernels of `openelm-mlx-native`."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., input) to (..., output)."""
        y = _multiply_plain(self, x)
        return y + self.bias if "bias" in self else y


class CPUEmbedding(nn.Embedding):
    """`nn.Embedding` for the CPU with the kernels of `openelm-mlx-native`."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states (..., M) to logits (..., V)."""
        return _multiply_plain(self, x)


class CPURMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` for the CPU with the kernels of `openelm-mlx-native`."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., M) to (..., M)."""
        return rms_norm(x, self["weight"], self.eps)


def plain_layers(model: nn.Module) -> None:
    """Replace linear layers, embeddings and norms by those for the CPU, if `openelm-mlx-native` is installed."""
    if native_kernels() is None:
        return

    def replace(module: nn.Module) -> nn.Module:
        if type(module) is nn.Linear:
            rows, columns = module.weight.shape
            return CPULinear(columns, rows, bias="bias" in module)
        if type(module) is nn.RMSNorm:
            return CPURMSNorm(module.weight.shape[0], eps=module.eps)
        return CPUEmbedding(*module.weight.shape) if type(module) is nn.Embedding else module

    modules = tree_map_with_path(lambda _, m: replace(m), model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(modules)


def quantized_layers(model: nn.Module, quantizations: Mapping[str, Quantization], dtype: mx.Dtype) -> None:
    """Replace the layers in `quantizations` by quantized ones for the CPU; load weights afterwards.

    Args:
        quantizations: path of a layer: how its matrix is quantized.
        dtype: the type that the network computes in.
    """

    def replace(path: str, module: nn.Module) -> nn.Module:
        if path not in quantizations:
            return module
        options = quantizations[path].to_dict()
        rows, columns = module.weight.shape
        if isinstance(module, nn.Embedding):
            return CPUQuantizedEmbedding(rows, columns, dtype, **options)
        return CPUQuantizedLinear(columns, rows, bias=False, **options)

    modules = tree_map_with_path(replace, model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(modules)


def narrowed(scales: mx.array) -> mx.array:
    """Scales or biases (float32) in 16 bits if that changes none of them, as it is for models stored in 16 bits.

    The kernels of `openelm-mlx-native` read both, and decoding takes as long as reading the weights. Without them the
    array stays as it is.
    """
    if native_kernels() is None or scales.dtype != mx.float32:
        return scales
    for dtype in (mx.bfloat16, mx.float16):
        shorter = scales.astype(dtype)
        if mx.array_equal(shorter.astype(mx.float32), scales).item():
            return shorter
    return scales


def _parts(layer: nn.Module) -> tuple[mx.array, mx.array, mx.array | None]:
    return layer.weight, layer.scales, layer.biases if "biases" in layer else None


def _packing(layer: nn.Module) -> dict[str, Any]:
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def _multiply_plain(layer: nn.Module, x: mx.array) -> mx.array:
    kernels = native_kernels()
    if kernels is None or not x.dtype == layer.weight.dtype == mx.float32:
        return x @ layer.weight.T
    return kernels.matmul_transposed(x, layer.weight)


def _multiply(layer: nn.Module, x: mx.array) -> mx.array:
    kernels = native_kernels()
    if kernels is not None and x.dtype == mx.float32:
        return kernels.quantized_matmul(x, *_parts(layer), **_packing(layer), activations=native_activations())
    rows = layer.weight.shape[0]
    columns = x.shape[-1]
    team = max(1, min(len(compute_streams()), rows * columns // _SMALLEST_SHARE, rows))
    least = 0 if has_fast_matmul() else _MANY_INPUTS_SLOW
    unpack = math.prod(x.shape[:-1]) >= max(least, _MANY_INPUTS[layer.bits])
    rounds = -(-rows * columns // (team * _LARGEST_UNPACKED)) if unpack else 1
    if team == 1 and rounds == 1:
        return _multiply_rows(layer, x, slice(None), None, x if unpack else None)
    share = -(-rows // (team * rounds))
    streams = compute_streams()[:team]
    before = [x] * len(streams)  # a core dequantizes its next rows once it has finished the previous ones
    parts = []
    for number, start in enumerate(range(0, rows, share)):
        core = number % len(streams)
        part = _multiply_rows(layer, x, slice(start, start + share), streams[core], before[core] if unpack else None)
        before[core] = part
        parts.append(part)
    return mx.concatenate(parts, axis=-1)


def _multiply_rows(
    layer: nn.Module, x: mx.array, rows: slice, stream: mx.Stream | None, before: mx.array | None
) -> mx.array:
    """The product with a view of some rows; these are dequantized after `before` is computed, unless it is None."""
    packed = layer.weight[rows], layer.scales[rows], layer.biases[rows] if "biases" in layer else None
    options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode, "stream": stream}
    if before is None:
        return mx.quantized_matmul(x, *packed, **options)
    return _multiply_unpacked(x, before, packed, options)


def _multiply_unpacked(
    x: mx.array, before: mx.array, packed: tuple[mx.array, mx.array, mx.array | None], options: Any
) -> mx.array:
    """The product with a dequantized matrix; the backward pass dequantizes it again, instead of keeping it."""
    words, scales, biases = packed

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        (later,) = mx.depends([words], [before])
        matrix = mx.dequantize(later, scales, biases, **options, dtype=x.dtype)
        return mx.matmul(x, matrix.T, stream=options["stream"])

    @product.vjp
    def product_vjp(x, cotangent, output):  # type: ignore[no-untyped-def]
        # Depend on the cotangent: otherwise a compiled step would share one matrix with the forward pass and keep it.
        (later,) = mx.depends([words], [cotangent])
        matrix = mx.dequantize(later, scales, biases, **options, dtype=cotangent.dtype)
        return mx.matmul(cotangent, matrix, stream=options["stream"])

    return product(x)  # type: ignore[return-value]
