"""An interpreter for the pickle in a PyTorch file that runs no code from it.

A pickle is a program for a small stack machine, and Python's own `pickle` calls any function that it names. The machine
here knows a fixed set of names (tensors, ordered dictionaries, dtypes) and builds plain descriptions of them; any other
name is refused immediately. Nothing is ever imported or called.
"""

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import TorchFileError

_MARK = object()


@dataclass(frozen=True)
class Storage:
    """The storage of a tensor's values: a record of the zip file."""

    dtype: str  # float32, bfloat16, int64 ...
    key: str
    numel: int | None


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as the pickle describes it."""

    storage: Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque:
    """Any other value, irrelevant to the weights: an optimizer setting, a dtype, a random state."""


@dataclass(frozen=True)
class _Name:
    """An allowed name, `module.attribute`."""

    full: str


_STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "float64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}
_DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict"}
_TENSORS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_HARMLESS = {
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.dict",
    "builtins.float",
    "builtins.frozenset",
    "builtins.int",
    "builtins.list",
    "builtins.set",
    "builtins.slice",
    "builtins.tuple",
    "collections.Counter",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "torch.Size",
    "torch.device",
    *(f"torch.{name}" for name in ("float16", "float32", "float64", "bfloat16", "bool", "uint8")),
    *(f"torch.{name}" for name in ("int8", "int16", "int32", "int64")),
}
_ALLOWED = {*_STORAGES, *_DICTIONARIES, *_TENSORS, *_PARAMETERS, *_HARMLESS}


def read_pickle(data: bytes) -> Any:
    """The value that a pickle describes: dicts, lists, tuples, numbers, strings, `TensorRecord`s and `Opaque`s.

    Raises:
        TorchFileError: if the pickle is incomplete or damaged, or uses a name that is not allowed, with the name.
    """
    try:
        return _Machine().run(pickletools.genops(data))
    except TorchFileError:
        raise
    except Exception as error:  # damaged bytes can raise anything in the machine, but affect nothing outside it
        raise TorchFileError(f"its pickle is damaged ({type(error).__name__})") from error


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, operations: Iterator[tuple[Any, Any, Any]]) -> Any:
        for opcode, argument, _ in operations:
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise TorchFileError(f"its pickle uses the opcode {name}, which tensors do not need; nothing was run")
        raise TorchFileError("its pickle is truncated")

    def pop_mark(self) -> list[Any]:
        """Pop and return the values above the last mark, and the mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise TorchFileError("its pickle is damaged (no mark)")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def name(self, full: str) -> None:
        if full not in _ALLOWED:
            raise TorchFileError(
                f"its pickle uses the name {full[:200]!r}; only tensors, dictionaries, numbers and strings are "
                "supported; nothing was run"
            )
        self.stack.append(_Name(full))

    def stack_global(self, _: Any) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise TorchFileError("its pickle is damaged (name)")
        self.name(f"{module}.{attribute}")

    def persistent_id(self, _: Any) -> None:
        kind, storage_type, key, _location, numel = self.stack.pop()
        if kind != "storage" or not isinstance(storage_type, _Name) or storage_type.full not in _STORAGES:
            raise TorchFileError("its pickle refers to external data that is not a tensor storage")
        if not isinstance(key, str) or not (numel is None or type(numel) is int):
            raise TorchFileError("its pickle is damaged (storage)")
        self.stack.append(Storage(_STORAGES[storage_type.full], key, numel))

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise TorchFileError("its pickle calls something other than a function; nothing was run")
        self.stack.append(_describe(function.full, arguments))

    def build(self, _: Any) -> None:
        self.stack.pop()  # attributes, which do not matter for weights

    def set_items(self, _: Any) -> None:
        values = self.pop_mark()
        self._update(values)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2], strict=True):
                if isinstance(
                    key, str | int
                ):  # other keys never lead to weights, and hashing a nested tuple may never end
                    target[key] = value
        elif not isinstance(target, Opaque):
            raise TorchFileError("its pickle is damaged (items without a dictionary)")

    def appends(self, _: Any) -> None:
        self._extend(self.pop_mark())

    def append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Opaque):
            raise TorchFileError("its pickle is damaged (entries without a list)")

    def make_tuple(self, size: int) -> None:
        values = self.stack[len(self.stack) - size :]
        if len(values) != size:
            raise TorchFileError("its pickle is damaged (short tuple)")
        del self.stack[len(self.stack) - size :]
        self.stack.append(tuple(values))

    def make_dict(self, _: Any) -> None:
        values = self.pop_mark()
        self.stack.append({})
        self._update(values)


def _describe(function: str, arguments: tuple[Any, ...]) -> Any:
    """A description of what calling an allowed function would return."""
    if function in _DICTIONARIES:
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
        return {key: value for key, value in pairs if isinstance(key, str)}
    if function in _PARAMETERS:
        if not isinstance(arguments[0], TensorRecord):
            raise TorchFileError("its pickle is damaged (parameter)")
        return arguments[0]
    if function in _TENSORS:
        storage, offset, shape, strides = arguments[:4]
        numbers = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
        if not (isinstance(storage, Storage) and numbers):
            raise TorchFileError("its pickle is damaged (tensor)")
        if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
            raise TorchFileError("its pickle is damaged (shape)")
        return TensorRecord(storage, offset, shape, strides)
    return Opaque()


def _global(machine: _Machine, argument: str) -> None:
    machine.name(argument.replace(" ", ".", 1))


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[int(argument)] = machine.stack[-1]


def _get(machine: _Machine, argument: Any) -> None:
    machine.stack.append(machine.memo[int(argument)])


# Opcodes whose argument is the value.
_VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": Opaque,
    "MARK": lambda: _MARK,
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": _global,
    "STACK_GLOBAL": _Machine.stack_global,
    "BINPERSID": _Machine.persistent_id,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_mark()),
    "DICT": _Machine.make_dict,
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_mark().clear(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
}
