"""Writes files as `torch.save` does, without PyTorch, so that tests can also write what no PyTorch would."""

import struct
import zipfile
from dataclasses import dataclass, field

import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
}


@dataclass
class Tensor:
    """Values with the type that the file shall say, or a view of another tensor's storage."""

    values: np.ndarray
    dtype: str = "float32"
    key: str | None = None
    offset: int = 0
    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None


@dataclass
class Global:
    """A name of Python."""

    module: str
    name: str


@dataclass
class Call:
    """A call of a named function."""

    function: Global
    arguments: tuple = ()


@dataclass
class Raw:
    """Opcodes as they are."""

    opcodes: bytes


@dataclass
class _Writer:
    records: dict[str, bytes] = field(default_factory=dict)

    def write(self, value) -> bytes:
        if isinstance(value, Raw):
            return value.opcodes
        if isinstance(value, Global):
            return f"c{value.module}\n{value.name}\n".encode()
        if isinstance(value, Call):
            return self.write(value.function) + self.write(value.arguments) + b"R"
        if isinstance(value, Tensor):
            return self.write_tensor(value)
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else f"L{value}L\n".encode()
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            raw = value.encode()
            return b"X" + struct.pack("<I", len(raw)) + raw
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.write, value)) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(map(self.write, value)) + b"e"
        assert isinstance(value, dict), f"cannot write {type(value)}"
        items = b"".join(self.write(key) + self.write(entry) for key, entry in value.items())
        return b"ccollections\nOrderedDict\n)R(" + items + b"u"

    def write_tensor(self, tensor: Tensor) -> bytes:
        values = np.ascontiguousarray(tensor.values)
        key = tensor.key if tensor.key is not None else str(len(self.records))
        self.records.setdefault(f"data/{key}", values.tobytes())
        storage = ("storage", Global("torch", STORAGES[tensor.dtype]), key, "cpu", values.size)
        shape = values.shape if tensor.shape is None else tensor.shape
        strides = tensor.strides
        if strides is None:
            strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        arguments = (Raw(self.write(storage) + b"Q"), tensor.offset, shape, strides, False, {})
        return self.write(Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments))


def save(path, value, *, compression=zipfile.ZIP_STORED, pickle=None, leave_out=(), extra=None):
    """Write `value` to `path`; `pickle` stands in place of its description, `extra` are further records."""
    writer = _Writer()
    description = b"\x80\x02" + writer.write(value) + b"."
    records = {"data.pkl": description if pickle is None else pickle, "byteorder": b"little", **writer.records}
    records["version"] = b"3\n"  # of the archive; PyTorch 2.13 requires it
    records.update(extra or {})
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, raw in records.items():
            if name not in leave_out:
                file.writestr(f"archive/{name}", raw)
    return path


def describe(value) -> bytes:
    """The pickle that `save` would write."""
    return b"\x80\x02" + _Writer().write(value) + b"."
