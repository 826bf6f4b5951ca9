"""The graph of a step as a Metal GPU would get it, built on any machine and never evaluated.

Without Metal, MLX replaces `mx.fast.rms_norm` and its kin by plain operations while the graph is built, and custom
kernels cannot be called at all. Within `as_on_metal` all of them are stand-ins: arrays that depend on the inputs
and on a marker by which the exported graph tells which kernel they come from.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

_UNARY = """Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType Ceil Cos Conjugate Cosh Remainder Erf ErfInv Exp
Floor Log Log1p LogicalNot Negative Round Sigmoid Sign Sin Sinh Square Sqrt Tan Tanh Expm1 Real Imag BitwiseInvert Rsqrt
Log2 Log10"""
_BINARY = """Add Divide Equal Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr LogAddExp Maximum Minimum
Multiply NotEqual Power Subtract ArcTan2"""
_BITWISE = ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift")
ELEMENTWISE = frozenset([*_UNARY.split(), *_BINARY.split(), *_BITWISE, "Select"])
_BY_NUMBER = {"BitwiseBinary": _BITWISE, "Reduce": ("And", "Or", "Sum", "Prod", "Min", "Max")}  # exported by number
_FUSABLE = ELEMENTWISE | {"Broadcast"}
_LARGEST_DEPTH, _MOST_INPUTS = 11, 24  # of a fused kernel: mlx/compile.cpp, max_compile_depth and max_compile_arrays


@dataclass(frozen=True)
class Value:
    """An array of the graph."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass
class Node:
    """A primitive, several that `mx.compile` fuses into one kernel, or a kernel that a stand-in stands for."""

    name: str
    inputs: list[str]
    outputs: list[str]
    arguments: list[Any] = field(default_factory=list)  # as MLX exports them
    options: dict[str, Any] | None = None  # of the call of a kernel, if this comes from a stand-in

    @property
    def is_stand_in(self) -> bool:
        """Whether this is a kernel that a stand-in stands for."""
        return self.options is not None


@dataclass
class Graph:
    """Nodes in the order in which MLX evaluates them."""

    nodes: list[Node]
    values: dict[str, Value]
    inputs: list[str]
    outputs: list[str]

    def names(self) -> Counter[str]:
        """How often each primitive occurs."""
        return Counter(node.name for node in self.nodes)


@dataclass(frozen=True)
class Kernel:
    """A call that a stand-in recorded."""

    name: str
    options: dict[str, Any]
    num_outputs: int = 1


class Recorder:
    """Stand-ins for kernels, and the calls that they recorded."""

    def __init__(self) -> None:
        self.calls: dict[int, Kernel] = {}
        self._numbers = itertools.count(1)

    def call(
        self, kernel: Kernel, inputs: Sequence[mx.array], shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype]
    ) -> list[mx.array]:
        """Arrays of these shapes and types that depend on the inputs."""
        number = next(self._numbers)
        self.calls[number] = replace(kernel, num_outputs=len(shapes))
        outputs = [blank(tuple(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        return mx.depends(outputs, [*inputs, mx.array([number], mx.int32)])

    def rms_norm(self, x: mx.array, weight: mx.array | None, eps: float, stream: Any = None) -> mx.array:
        """As `mx.fast.rms_norm`."""
        return self.call(Kernel("RMSNorm", {}), [x] if weight is None else [x, weight], [x.shape], [x.dtype])[0]

    def rope(self, a: mx.array, dims: int, *, offset: int | mx.array, **options: Any) -> mx.array:
        """As `mx.fast.rope`."""
        where = offset if isinstance(offset, mx.array) else mx.array(offset, mx.int32)
        return self.call(Kernel("RoPE", {"dims": dims}), [a, where], [a.shape], [a.dtype])[0]

    def attention(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
    ) -> mx.array:
        """As `mx.fast.scaled_dot_product_attention`, for a few queries of a width for which there is a kernel."""
        assert q.shape[3] in (64, 96, 128, 256), f"no kernel for heads of width {q.shape[3]}"
        assert q.shape[2] <= 8, "this counts steps of a few tokens"
        assert q.shape[2] * q.shape[1] // k.shape[1] <= 32, "too many queries share keys"
        inputs = [q, k, v]
        if isinstance(mask, mx.array):  # as mlx/fast.cpp does it before the primitive is made
            inputs.append(mx.broadcast_to(mask, (*q.shape[:3], k.shape[2])))
        shape = (*q.shape[:3], v.shape[3])
        return self.call(Kernel("ScaledDotProductAttention", {}), inputs, [shape], [q.dtype])[0]

    def quantize(self, w: mx.array, group_size: int = 64, bits: int = 4, **_: Any) -> list[mx.array]:
        """As `mx.quantize` in affine mode."""
        rows, groups = w.shape[:-1], w.shape[-1] // group_size
        shapes = [(*rows, w.shape[-1] * bits // 32), (*rows, groups), (*rows, groups)]
        return self.call(Kernel("Quantize", {}), [w], shapes, [mx.uint32, w.dtype, w.dtype])

    def dequantize(
        self, w: mx.array, scales: mx.array, biases: mx.array, group_size: int = 64, bits: int = 4, **_: Any
    ) -> mx.array:
        """As `mx.dequantize` in affine mode."""
        shape = (*w.shape[:-1], w.shape[-1] * 32 // bits)
        return self.call(Kernel("Quantize", {}), [w, scales, biases], [shape], [scales.dtype])[0]

    def contiguous(self, a: mx.array, *_: Any, **__: Any) -> mx.array:
        """As `mx.contiguous`, which MLX does not export."""
        return self.call(Kernel("Contiguous", {}), [a], [a.shape], [a.dtype])[0]

    def custom_kernel(
        self, name: str = "", *_: Any, ensure_row_contiguous: bool = True, **__: Any
    ) -> Callable[..., Any]:
        """As `mx.fast.metal_kernel`."""

        def kernel(
            *, inputs: Sequence[Any], output_shapes: Any, output_dtypes: Any, init_value: Any = None, **_: Any
        ) -> list[mx.array]:
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            options = {"copies": ensure_row_contiguous, "filled": init_value is not None, "kernel": name}
            return self.call(Kernel("CustomKernel", options), arrays, output_shapes, output_dtypes)

        return kernel

    def swiglu(self, gate: mx.array, x: mx.array) -> mx.array:
        """As mlx-lm's, which is compiled into one kernel."""
        return self.call(Kernel("CompiledSigmoidMultiplyMultiply", {}), [gate, x], [x.shape], [x.dtype])[0]


def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A new evaluated array of any size that takes a few bytes."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array


@contextmanager
def as_on_metal() -> Iterator[Recorder]:
    """Build graphs with stand-ins for the kernels of Metal."""
    recorder = Recorder()
    stand_ins: list[tuple[Any, str, Any]] = [
        (mx.fast, "rms_norm", recorder.rms_norm),
        (mx.fast, "rope", recorder.rope),
        (mx.fast, "scaled_dot_product_attention", recorder.attention),
        (mx.fast, "metal_kernel", recorder.custom_kernel),
        (mx, "quantize", recorder.quantize),
        (mx, "dequantize", recorder.dequantize),
        (mx, "contiguous", recorder.contiguous),
    ]
    with ExitStack() as stack:
        for place, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(place, name, stand_in))
        yield recorder


def traced(function: Callable[..., Any], arguments: Any, recorder: Recorder) -> Graph:
    """The graph of a function of nested arrays, which are its inputs; other arrays are constants."""
    leaves: Any = tree_flatten(arguments)

    def flat(*arrays: mx.array) -> Any:
        nested = tree_unflatten([(path, array) for (path, _), array in zip(leaves, arrays, strict=True)])
        results: Any = tree_flatten(function(*nested))
        return [array for _, array in results]

    parts: list[dict[str, Any]] = []
    mx.export_function(parts.append, flat, *(array for _, array in leaves))
    return _graph(parts, recorder)


def _graph(parts: list[dict[str, Any]], recorder: Recorder) -> Graph:
    graph = Graph([], {}, [], [])
    markers: dict[str, Kernel] = {}
    for part in parts:
        match part["type"]:
            case "inputs":
                graph.inputs = [name for name, *_ in part["inputs"]]
                graph.values.update({name: Value(shape, dtype) for name, shape, dtype in part["inputs"]})
            case "outputs":
                graph.outputs = [name for name, *_ in part["outputs"]]
            case "constants":
                for name, array in part["constants"]:
                    graph.values[name] = Value(tuple(array.shape), array.dtype)
                    if array.shape == (1,) and array.dtype == mx.int32 and int(array) in recorder.calls:
                        markers[name] = recorder.calls[int(array)]
            case "primitive":
                graph.values.update({name: Value(shape, dtype) for name, shape, dtype in part["outputs"]})
                name = part["name"]
                node = Node(
                    _BY_NUMBER[name][int(part["arguments"][0])] if name in _BY_NUMBER else name,
                    [name for name, *_ in part["inputs"]],
                    [name for name, *_ in part["outputs"]],
                    part["arguments"],
                )
                graph.nodes.append(_unmasked(node, markers))
    return graph


def _unmasked(node: Node, markers: dict[str, Kernel]) -> Node:
    """What a stand-in stands for."""
    if node.name != "Depends" or node.inputs[-1] not in markers:
        return node
    kernel = markers[node.inputs[-1]]
    return Node(kernel.name, node.inputs[kernel.num_outputs : -1], node.outputs, options=kernel.options)


def fused(graph: Graph) -> Graph:
    """The graph after `mx.compile` has fused elementwise operations, by the rules of mlx/compile.cpp, compile_fuse."""
    nodes = [replace(node, inputs=list(node.inputs)) for node in graph.nodes]
    fusing = _Fusing(replace(graph, nodes=nodes, values=dict(graph.values)))
    done: set[int] = set()  # nodes that were fused, by identity
    kept: list[Node] = []
    for node in reversed(nodes):
        if id(node) in done:
            continue
        group = fusing.group(node)
        done.update(group)
        kept.append(node if len(group) < 2 else fusing.joined(node, group))
    return replace(fusing.graph, nodes=kept[::-1])


class _Fusing:
    """What MLX knows while it fuses the nodes of a graph."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._outputs = set(graph.outputs)
        self._producer = {name: node for node in graph.nodes for name in node.outputs}
        self._users: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self._users.setdefault(name, []).append(node)

    def group(self, last: Node) -> set[int]:
        """Identities of the nodes that are fused into a kernel that ends with `last`."""
        members: set[int] = set()
        inputs: set[str] = set()
        values = self.graph.values
        shape = values[last.outputs[0]].shape

        def visit(name: str, depth: int) -> None:
            node = self._producer.get(name)
            if node is not None and id(node) in members:
                return
            is_end = name in self._outputs and values[name].shape != shape
            if node is None or depth >= _LARGEST_DEPTH or node.name not in _FUSABLE or is_end:
                inputs.add(name)
                return
            if depth and any(id(user) not in members for user in self._users[name]):
                if node.name == "Broadcast" and len(inputs) < _MOST_INPUTS:
                    visit(self._split(name, members), depth)
                else:
                    inputs.add(name)
                return
            (inputs.add if name in self._outputs else inputs.discard)(name)
            if len(inputs) >= _MOST_INPUTS:
                return
            members.add(id(node))
            for number in range(len(node.inputs)):  # a visit may replace an input by a copy
                visit(node.inputs[number], depth + 1)

        if last.name in ELEMENTWISE:
            visit(last.outputs[0], 0)
        return members

    def _split(self, name: str, members: set[int]) -> str:
        """Give those users of a broadcast that are members a copy of it; the copy's name."""
        copy = f"{name} {len(self._producer)}"
        self.graph.values[copy] = self.graph.values[name]
        self._producer[copy] = replace(self._producer[name], outputs=[copy])
        self._users[copy] = [user for user in self._users[name] if id(user) in members]
        self._users[name] = [user for user in self._users[name] if id(user) not in members]
        for user in self._users[copy]:
            user.inputs = [copy if one == name else one for one in user.inputs]
        return copy

    def joined(self, last: Node, members: set[int]) -> Node:
        """One node for a group, named as MLX names it."""
        order: list[Node] = []
        inputs: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen:
                return
            seen.add(name)
            node = self._producer.get(name)
            if node is None or id(node) not in members:
                inputs.append(name)
                return
            for source in node.inputs:
                visit(source)
            order.append(node)

        visit(last.outputs[0])
        results = [node.outputs[0] for node in order if node.outputs[0] in self._outputs and node is not last]
        return Node("Compiled" + "".join(node.name for node in order), inputs, [*results, *last.outputs])


def drawn(arrays: Sequence[mx.array]) -> Counter[str]:
    """How often each primitive occurs in the graph that unevaluated arrays really have; a stand-in is `Depends`."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return Counter(re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue()))
