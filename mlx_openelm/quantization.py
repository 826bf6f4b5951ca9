"""How matrices are quantized: bits, group size and mode.

MLX stores a quantized matrix as packed words (`weight`), one scale per group (`scales`) and, in affine mode, one offset
per group (`biases`). A `PackedTensor` holds these parts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import ConfigError, QuantizationError, WeightsError, quoted, readable
from .tensors import LazyTensor, checked_cast, dtype_name, is_below

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # mode: bits, group size
_LARGEST_VALUES = {"mxfp4": 6, "mxfp8": 448}  # before scaling
_NOT_A_NUMBER = 0x7F  # the lower seven bits of an 8-bit float (e4m3) that is NaN
PARTS = ("weight", "scales", "biases")
MODES = ("affine", *FLOAT_MODES)


@dataclass(frozen=True)
class Quantization:
    """The quantization of a matrix.

    Raises:
        QuantizationError: for bits, a group size or a mode that MLX does not offer.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise QuantizationError(f"unknown quantization mode {quoted(self.mode)} (choose from {', '.join(MODES)})")
        for name in ("bits", "group_size"):
            if type(getattr(self, name)) is not int:
                raise QuantizationError(f"{name} must be an integer; got {quoted(getattr(self, name))}")
        if self.mode != "affine":
            if (self.bits, self.group_size) != FLOAT_MODES[self.mode]:
                bits, group_size = FLOAT_MODES[self.mode]
                raise QuantizationError(
                    f"{self.mode} needs {bits} bits and groups of {group_size}; "
                    f"got {quoted(self.bits)} and {quoted(self.group_size)}"
                )
            return
        if self.bits not in AFFINE_BITS:
            raise QuantizationError(f"bits must be one of {', '.join(map(str, AFFINE_BITS))}; got {quoted(self.bits)}")
        if self.group_size not in AFFINE_GROUP_SIZES:
            sizes = ", ".join(map(str, AFFINE_GROUP_SIZES))
            raise QuantizationError(f"group_size must be one of {sizes}; got {quoted(self.group_size)}")

    @classmethod
    def of(cls, bits: int | None = None, group_size: int | None = None, mode: str | None = None) -> "Quantization":
        """A quantization with defaults for omitted arguments: affine, 4 bits, groups of 64, or as the mode requires."""
        mode = mode or cls.mode
        default_bits, default_group_size = FLOAT_MODES.get(mode, (cls.bits, cls.group_size))
        return cls(
            default_bits if bits is None else bits,
            default_group_size if group_size is None else group_size,
            mode,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Quantization":
        """Read the `quantization` entry of a `config.json`; entries for single matrices are read by `join_packed`.

        Raises:
            ConfigError: if the entry is not a valid quantization.
        """
        try:
            return cls.of(*(values.get(field.name) for field in fields(cls)))
        except (TypeError, QuantizationError) as error:
            raise ConfigError(f"invalid quantization in the configuration: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The `quantization` entry of a `config.json`, as MLX tools write it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of a matrix of this shape (rows, columns) divide into whole groups and whole 32-bit words."""
        return len(shape) == 2 and shape[1] % self.group_size == 0 and shape[1] * self.bits % 32 == 0

    def quantize(self, matrix: mx.array) -> dict[str, mx.array]:
        """Quantize a matrix (rows, columns) to `weight`, `scales` and, if affine, `biases`; `plan` says the shapes."""
        parts = mx.quantize(matrix, group_size=self.group_size, bits=self.bits, mode=self.mode)
        return dict(zip(PARTS, parts, strict=False))

    def dequantize(self, parts: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """The matrix (rows, columns) in `dtype` from its parts."""
        return mx.dequantize(
            parts["weight"],
            parts["scales"],
            parts.get("biases"),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=dtype,
        )

    def plan(self, shape: tuple[int, int], dtype: mx.Dtype) -> dict[str, tuple[tuple[int, int], mx.Dtype]]:
        """Shape and type of each part of a quantized matrix of this shape (rows, columns) and type."""
        rows, columns = shape
        groups = rows, columns // self.group_size
        weight = (rows, columns * self.bits // 32), mx.uint32
        if self.mode != "affine":
            return {"weight": weight, "scales": (groups, mx.uint8)}
        return {"weight": weight, "scales": (groups, dtype), "biases": (groups, dtype)}


@dataclass(frozen=True)
class PackedTensor:
    """A quantized matrix on disk."""

    parts: dict[str, LazyTensor]  # weight, scales and, if affine, biases
    quantization: Quantization

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (rows, columns) of the unquantized matrix."""
        rows, words = self.parts["weight"].shape
        return rows, words * 32 // self.quantization.bits

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the scales, which was that of the matrix; float32 if they do not tell (modes other than affine)."""
        scales = self.parts["scales"].dtype
        return mx.float32 if scales == mx.uint8 else scales

    @property
    def nbytes(self) -> int:
        """Size of all parts in bytes."""
        return sum(part.nbytes for part in self.parts.values())

    def cast(self, name: str, dtype: mx.Dtype | None = None) -> "PackedTensor":
        """The matrix with scales and biases in `dtype`; integer parts keep their type.

        Args:
            name: for messages.
            dtype: by default that of each part.
        Raises:
            WeightsError: later, when parts are read, if values of the matrix are not finite in `dtype`.
        """
        checked = {part: partial(_read_checked, self, name, part, dtype) for part in self.parts}
        types = {part: dtype if mx.issubdtype(t.dtype, mx.floating) else None for part, t in self.parts.items()}
        parts = {
            part: LazyTensor(tensor.shape, types[part] or tensor.dtype, checked[part])
            for part, tensor in self.parts.items()
        }
        return PackedTensor(parts, self.quantization)

    def dequantize(self) -> LazyTensor:
        """The unquantized matrix, dequantized by rows when read."""

        def read_rows(start: int, stop: int) -> mx.array:
            parts = {name: part.read_rows(start, stop) for name, part in self.parts.items()}
            return self.quantization.dequantize(parts, self.dtype)

        return LazyTensor(self.shape, self.dtype, read_rows)


def pack(tensor: LazyTensor, quantization: Quantization) -> PackedTensor:
    """Quantize a matrix lazily.

    Rows are quantized when those of the first part, `weight`, are read; the other parts stay in memory until all of
    their rows have been read.
    """
    waiting: dict[str, list[mx.array]] = {}

    def take_first(start: int, stop: int) -> mx.array:
        first, *others = quantization.quantize(tensor.read_rows(start, stop)).items()
        for name, rows in others:
            if start == 0:
                waiting[name] = []
            waiting[name].append(rows)
        return first[1]

    def take(name: str, start: int, stop: int) -> mx.array:
        if name not in waiting:
            return quantization.quantize(tensor.read_rows(start, stop))[name]
        rows = mx.concatenate(waiting[name])[start:stop]
        if stop == tensor.num_rows:
            del waiting[name]
        return rows

    rows, columns = tensor.shape
    plan = quantization.plan((rows, columns), tensor.dtype)
    return PackedTensor(
        {
            name: LazyTensor(shape, dtype, take_first if name == "weight" else partial(take, name))
            for name, (shape, dtype) in plan.items()
        },
        quantization,
    )


def join_packed(
    tensors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]], written: Mapping[str, Any] | None
) -> dict[str, LazyTensor | PackedTensor]:
    """Join the parts of each quantized matrix to a `PackedTensor`; other tensors stay unchanged.

    Args:
        shapes: shapes (rows, columns) that the configuration requires. Without `written`, the quantization is inferred
            by comparing them with the stored shapes.
        written: the `quantization` entry of `config.json`: a default, and exceptions under the path of a matrix.
    Raises:
        ConfigError: if the entry is invalid.
        QuantizationError: if the parts do not match the entry, or, without one, any quantization of MLX.
        WeightsError: later, when parts are read, if values of a matrix are not finite.
    """
    if not isinstance(written, Mapping | None):
        raise ConfigError(f"quantization must be an object; got {quoted(written)}")
    joined: dict[str, LazyTensor | PackedTensor] = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        is_packed = f"{path}.weight" in tensors and f"{path}.scales" in tensors
        if not is_packed or part not in ("weight", "scales", "biases"):
            joined[name] = tensor
        elif part == "weight":
            parts = {key: tensors[f"{path}.{key}"] for key in PARTS if f"{path}.{key}" in tensors}
            quantization = _entry_of(path, written) or _recognise(name, parts, shapes.get(name, ()))
            _check_parts(path, parts, quantization, shapes.get(name))
            joined[name] = PackedTensor(parts, quantization).cast(path)
    return joined


def _entry_of(path: str, written: Mapping[str, Any] | None) -> Quantization | None:
    if written is None:
        return None
    entry = written.get(path, written)
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"the quantization of {path} is {quoted(entry)} in the configuration, but its weights are quantized"
        )
    return Quantization.from_dict(entry)


def _check_parts(
    path: str, parts: Mapping[str, LazyTensor], quantization: Quantization, shape: tuple[int, ...] | None
) -> None:
    """Make sure that the parts have the types and shapes of a matrix (rows, columns) with this quantization.

    Args:
        shape: by default that of `weight`.
    """
    stored = parts["weight"].shape
    if shape is None and len(stored) == 2:
        shape = stored[0], stored[1] * 32 // quantization.bits
    kind = f"{quantization.bits}-bit {quantization.mode} with groups of {quantization.group_size}"
    if shape is None or not quantization.fits(shape):
        raise QuantizationError(f"{readable(path)} of shape {shape or stored} cannot be {kind}")
    rows, columns = shape
    for part, (wanted, dtype) in quantization.plan((rows, columns), mx.float32).items():
        if part not in parts:
            raise QuantizationError(f"{path}.{part} is missing: according to the configuration, {path} is {kind}")
        found = parts[part]
        is_float = dtype == mx.float32 and mx.issubdtype(found.dtype, mx.floating)
        if found.shape != wanted or not (is_float or found.dtype == dtype):
            raise QuantizationError(
                f"{path}.{part} is {dtype_name(found.dtype)} of shape {found.shape}; a matrix of shape {shape} in "
                f"{kind} needs {'floats' if dtype == mx.float32 else dtype_name(dtype)} of shape {wanted}; check "
                "`quantization` in config.json, or download or convert the model again"
            )
    if quantization.mode != "affine" and "biases" in parts:
        raise QuantizationError(f"{path}.biases is unexpected: according to the configuration, {path} is {kind}")


def _read_checked(
    packed: PackedTensor, name: str, part: str, dtype: mx.Dtype | None, start: int, stop: int
) -> mx.array:
    """Rows of a part; scales and biases in `dtype`. The largest value of each group must be finite in that type."""
    array = packed.parts[part].read_rows(start, stop)
    mode, label = packed.quantization.mode, f"{name}.{part}"
    if part == "weight":
        if mode == "mxfp8" and mx.any((array.view(mx.uint8) & 0x7F) == _NOT_A_NUMBER).item():
            raise WeightsError(f"{readable(label)} contains NaN: the checkpoint is damaged")
        return array
    if mode == "affine":
        steps = 2**packed.quantization.bits - 1 if part == "scales" else 1
        if not is_below(array, float(mx.finfo(dtype or array.dtype).max) / 2 / steps):
            parts = [packed.parts[key].read_rows(start, stop).astype(mx.float32) for key in ("scales", "biases")]
            largest = parts[0] * (2**packed.quantization.bits - 1) + parts[1]
            checked_cast(name, largest, dtype or array.dtype, computed=True)
        return checked_cast(label, array, dtype or array.dtype)
    if mode == "nvfp4":
        if mx.any((array & 0x7F) == _NOT_A_NUMBER).item():
            raise WeightsError(f"{readable(label)} contains NaN: the checkpoint is damaged")
        return array
    limit = mx.finfo(dtype or mx.float32).max / _LARGEST_VALUES[mode]
    if array.size and array.max().item() - 127 > math.log2(limit):  # type: ignore[operator]
        what = dtype_name(dtype or mx.float32)
        raise WeightsError(f"{readable(label)} contains NaN, or values beyond the range of {what}")
    return array


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Shape (rows, columns) of a layer's matrix, quantized or not."""
    rows, columns = layer.weight.shape
    return rows, columns * 32 // layer.bits if "scales" in layer else columns


def dequantized(layer: nn.Module, dtype: mx.Dtype) -> mx.array:
    """A layer's matrix (rows, columns), dequantized if necessary, in `dtype`."""
    if "scales" not in layer:
        return layer.weight.astype(dtype)
    parts = {part: layer[part] for part in PARTS if part in layer}
    wide = {p: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for p, a in parts.items()}
    return Quantization(layer.bits, layer.group_size, layer.mode).dequantize(wide, dtype)


def _recognise(name: str, parts: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Quantization:
    """Infer the affine quantization from the parts and the shape (rows, columns) of the matrix."""
    scales, weight = parts["scales"].shape, parts["weight"].shape
    groups, words = (scales or (0,))[-1], (weight or (0,))[-1]
    if len(shape) != 2 or not groups or shape[1] % groups or words * 32 % shape[1]:
        raise QuantizationError(f"the quantization of {name} cannot be inferred from its shapes")
    return Quantization(words * 32 // shape[1], shape[1] // groups)
