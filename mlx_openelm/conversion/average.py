"""Averaging several checkpoints of one run; Apple released such an average as its final weights."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from ..errors import WeightsError
from ..quantization import PackedTensor
from ..tensors import LazyTensor, checked_cast
from .source import Source, Tensor


def averaged_source(sources: Sequence[Source]) -> Source:
    """A source whose tensors are the means of the given sources' tensors, summed in float32.

    Raises:
        WeightsError: if the configurations differ; later, when values are read, if their sum is beyond float32.
    """
    first, *others = sources
    for other in others:
        if other.config != first.config:
            raise WeightsError(f"{other.name} and {first.name} have different configurations and cannot be averaged")
    tensors: dict[str, Tensor] = {
        name: _mean(name, [source.tensors[name] for source in sources]) for name in first.tensors
    }
    return replace(first, tensors=tensors, name=f"the average of {len(sources)} checkpoints")


def _mean(name: str, tensors: Sequence[Tensor]) -> LazyTensor:
    full = [tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor for tensor in tensors]

    def read_rows(start: int, stop: int) -> mx.array:
        total = mx.zeros((1,))
        for tensor in full:
            total = total + tensor.read_rows(start, stop)
        return checked_cast(name, total / len(full), full[0].dtype, computed=True)

    return LazyTensor(full[0].shape, full[0].dtype, read_rows)
