"""Products with quantized weights: against plain products with the same weights, dequantized by the CPU."""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from ..loading import assemble
from ..quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_MODES, PARTS, Quantization
from ..tensors import dtype_name
from .check import Check, Comparison, Outcome, as_numpy, judged
from .reference import on_reference
from .samples import packed_arrays, sample_config, sample_tokens
from .session import Session

_SHAPES = ((1, 1), (4, 1), (1, 48))  # rows and tokens: vectors, a few of them, and matrices take different kernels


def checks() -> Iterator[Check]:
    """Checks of quantized weights."""
    kinds = [Quantization(bits=bits) for bits in AFFINE_BITS]
    kinds += [Quantization(group_size=size) for size in AFFINE_GROUP_SIZES if size != Quantization.group_size]
    kinds += [Quantization.of(mode=mode) for mode in FLOAT_MODES]
    for kind in kinds:
        name = kind.mode if kind.mode != "affine" else f"{kind.bits} bits in groups of {kind.group_size}"
        yield Check(f"quantized weights, {name}", partial(_products, kind))


def _products(quantization: Quantization, session: Session) -> Outcome:
    config = sample_config(session.extent.trained_size)
    comparisons = []
    for dtype in session.dtypes:
        with on_reference():
            arrays, packed = packed_arrays(config, quantization, dtype)
            plain = {name: array for name, array in arrays.items() if name.rpartition(".")[0] not in packed}
            for path, kind in packed.items():
                names = {part: f"{path}.{part}" for part in PARTS}
                parts = {part: arrays[name] for part, name in names.items() if name in arrays}
                plain[f"{path}.weight"] = kind.dequantize(parts, mx.float32)
            reference = assemble(config, plain, {}, mx.float32)
            expected = [as_numpy(reference(sample_tokens(*shape))) for shape in _SHAPES]
            del reference, plain
        network = assemble(config, arrays, packed, dtype)
        for shape, logits in zip(_SHAPES, expected, strict=True):
            what = f"{dtype_name(dtype)}, {shape[0]} x {shape[1]} tokens"
            comparisons.append(Comparison.of(what, network(sample_tokens(*shape)), logits, session.tolerance(dtype)))
    return judged(comparisons)
