"""Where the numbers of an array lie in memory, without any memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from step_graph import Value

Strides = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where the numbers of an array lie."""

    value: Value
    strides: Strides

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.value.shape

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers; one that is broadcast counts once."""
        sizes = (size for size, stride in zip(self.shape, self.strides, strict=True) if stride or size == 1)
        return math.prod(sizes) * self.value.dtype.size

    @property
    def is_row_contiguous(self) -> bool:
        """In row order, without holes; the stride of an axis of size 1 does not matter."""
        return all(
            size == 1 or stride == expected
            for size, stride, expected in zip(self.shape, self.strides, contiguous(self.shape), strict=True)
        )

    @property
    def is_dense(self) -> bool:
        """No holes and no broadcast axes, in whatever order."""
        expected = 1
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True


def contiguous(shape: Sequence[int]) -> Strides:
    """Strides of an array in row order."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def reshaped(x: Layout, shape: tuple[int, ...]) -> Strides | None:
    """Strides of a view in another shape; None if it needs a copy."""
    if x.is_row_contiguous:
        return contiguous(shape)
    if not x.shape:
        return (0,) * len(shape)
    sizes: list[int] = []
    steps: list[int] = []
    for size, stride in zip(x.shape, x.strides, strict=True):
        if size == 1:
            continue
        if sizes and steps[-1] == stride * size:
            sizes[-1] *= size
            steps[-1] = stride
        else:
            sizes.append(size)
            steps.append(stride)
    strides: list[int] = []
    axis = 0
    for size in shape:
        if axis < len(sizes) and sizes[axis] % size == 0:
            sizes[axis] //= size
            strides.append(sizes[axis] * steps[axis])
            axis += sizes[axis] == 1
        elif size == 1:
            strides.append(strides[-1])
        else:
            return None
    return tuple(strides)
