"""What each primitive costs on Metal: kernels started, copies among them, and bytes, by reading MLX's source.

`COSTS` says for each primitive where in MLX (0.32, `ml-explore/mlx`) its cost stands. Strides are followed through
views, because many kernels copy inputs that are not contiguous.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from step_graph import ELEMENTWISE, Graph, Node, Value

Strides = tuple[int, ...]
_TWO_PASSES_WITH_GROUPS = 4096  # keys from which attention takes two kernels, if queries share keys
_TWO_PASSES_LARGE = 1024  # the same on the larger chips
_SPLIT_K_TILES = 1024, 2048  # tiles of 16 x 16 up to which a product is split along K; the second on larger chips


@dataclass(frozen=True)
class Layout:
    """Where the numbers of an array lie."""

    value: Value
    strides: Strides

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers in memory; a number that is broadcast counts once."""
        sizes = (size for size, stride in zip(self.shape, self.strides, strict=True) if stride or size == 1)
        return math.prod(sizes) * self.value.dtype.size

    @property
    def is_row_contiguous(self) -> bool:
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


@dataclass
class Cost:
    """Of one node or of many."""

    launches: int = 0
    copies: int = 0  # of the launches: those that only bring an input into another order
    bytes_read: int = 0
    bytes_written: int = 0
    launches_in_flight: int = 0  # more, if the step before is not finished, so that no buffer can be written in place
    bytes_in_flight: int = 0

    def add(self, other: "Cost") -> None:
        """Add another cost to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def copy(self, layout: Layout) -> None:
        """Add the copy of an input."""
        self.launches += 1
        self.copies += 1
        self.bytes_read += layout.nbytes
        self.bytes_written += layout.size * layout.value.dtype.size


@dataclass
class Step:
    """What is known while the nodes of a graph are counted in order."""

    graph: Graph
    large_chip: bool  # Max and Ultra
    layouts: dict[str, Layout] = field(default_factory=dict)
    updated: set[str] = field(default_factory=set)  # arrays that this step made, so that they may be overwritten
    total: Cost = field(default_factory=Cost)
    by_name: dict[str, Cost] = field(default_factory=dict)

    def layout(self, name: str) -> Layout:
        """Of an array; inputs and constants lie in row order."""
        if name not in self.layouts:
            value = self.graph.values[name]
            self.layouts[name] = Layout(value, contiguous(value.shape))
        return self.layouts[name]


Rule = Callable[[Step, Node, list[Layout]], Cost]


def count(graph: Graph, large_chip: bool = False) -> Step:
    """Costs of all nodes.

    Args:
        large_chip: Max or Ultra, which take two kernels for attention over 1,024 keys, others over 4,096.

    Raises:
        KeyError: for a primitive that `COSTS` does not have.
    """
    step = Step(graph, large_chip)
    for node in graph.nodes:
        inputs = [step.layout(name) for name in node.inputs]
        name = "Compiled" if node.name.startswith("Compiled") else node.name
        rule, _ = COSTS["elementwise" if name in ELEMENTWISE else name]
        cost = rule(step, node, inputs)
        step.total.add(cost)
        step.by_name.setdefault(node.name, Cost()).add(cost)
    return step


def _run(step: Step, node: Node, read: Sequence[Layout | int], launches: int = 1) -> Cost:
    """Kernels that read arrays (or so many bytes) and write all outputs."""
    written = sum(step.layout(name).size * step.layout(name).value.dtype.size for name in node.outputs)
    return Cost(launches, 0, sum(one if isinstance(one, int) else one.nbytes for one in read), written)


def _view(strides: Callable[[Step, Node, Layout, int], Strides]) -> Rule:
    """A rule for a primitive that only looks at its first input in another way."""

    def rule(step: Step, node: Node, inputs: list[Layout]) -> Cost:
        for number, name in enumerate(node.outputs):
            step.layouts[name] = Layout(step.graph.values[name], strides(step, node, inputs[0], number))
        return Cost()

    return rule


def _transposed(step: Step, node: Node, x: Layout, _: int) -> Strides:
    return tuple(x.strides[axis] for axis in node.arguments[0])


def _broadcast(step: Step, node: Node, x: Layout, _: int) -> Strides:
    shape = step.graph.values[node.outputs[0]].shape
    missing = len(shape) - len(x.shape)
    kept = zip(shape[missing:], x.shape, x.strides, strict=True)
    return (0,) * missing + tuple(0 if size != old else stride for size, old, stride in kept)


def _expanded(step: Step, node: Node, x: Layout, _: int) -> Strides:
    strides = list(x.strides)
    rank = len(strides) + len(node.arguments[0])
    for axis in sorted(axis % rank for axis in node.arguments[0]):
        strides.insert(axis, 1)
    return tuple(strides)


def _squeezed(step: Step, node: Node, x: Layout, _: int) -> Strides:
    dropped = {axis % len(x.strides) for axis in node.arguments[0]}
    return tuple(stride for axis, stride in enumerate(x.strides) if axis not in dropped)


def _sliced(step: Step, node: Node, x: Layout, _: int) -> Strides:
    return tuple(stride * by for stride, by in zip(x.strides, node.arguments[2], strict=True))


def _same(step: Step, node: Node, x: Layout, _: int) -> Strides:
    return x.strides


def _reshape(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    (name,) = node.outputs
    value = step.graph.values[name]
    strides = _reshaped(inputs[0], value.shape)
    cost = Cost()
    if strides is None:
        strides = contiguous(value.shape)
        cost.copy(inputs[0])
    step.layouts[name] = Layout(value, strides)
    return cost


def _reshaped(x: Layout, shape: tuple[int, ...]) -> Strides | None:
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


def _elementwise(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    outputs = [step.graph.values[name] for name in node.outputs]
    shaped = {x.strides for x in inputs if x.shape == outputs[0].shape and x.is_dense}
    if len(shaped) == 1 and all(x.size == 1 or x.strides in shaped for x in inputs):
        (strides,) = shaped
        step.layouts.update({n: Layout(v, strides) for n, v in zip(node.outputs, outputs, strict=True)})
    return _run(step, node, inputs)


def _plain(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    return _run(step, node, inputs)


def _rows(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    """Kernels along the last axis, whose rows must lie one behind the other."""
    x = inputs[0]
    cost = Cost()
    follow = len(x.shape) < 2 or x.shape[-2] == 1 or x.strides[-2] in (0, x.shape[-1])
    if not (x.is_dense and x.strides[-1:] in ((), (1,)) and follow):
        cost.copy(x)
    cost.add(_run(step, node, inputs))
    return cost


def _rope(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    x = inputs[0]
    shape, strides = x.shape, x.strides
    cost = Cost()
    three = len(shape) == 3 or math.prod(shape[:-3]) == 1
    swapped = len(shape) == 4 and strides[:3] == (math.prod(shape[1:]), shape[3], shape[1] * shape[3])
    if node.arguments[0]["dims"] < shape[-1] or not (x.is_row_contiguous or three or swapped):
        cost.copy(x)
    cost.add(_run(step, node, inputs))
    return cost


def _attention(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    q, k, v, *mask = inputs
    cost = Cost()
    heads = 0 if q.shape[0] != 1 else 1
    alone = 1 in q.shape[:2] and q.strides[3] == 1 and q.strides[heads] == q.shape[3]
    if not (q.is_row_contiguous or (alone and q.strides[2] == q.shape[3] * q.shape[heads])):
        cost.copy(q)
    for x in (k, v):
        if x.strides[-1] != 1 or not (1 in x.shape[:2] or x.strides[0] == x.strides[1] * x.shape[1]):
            cost.copy(x)
    for x in mask:
        if not (x.is_row_contiguous or 1 in q.shape[:2] or x.strides[0] == x.strides[1] * x.shape[1]):
            cost.copy(x)
    keys = k.shape[2]
    grouped = k.shape[1] < q.shape[1] and keys >= _TWO_PASSES_WITH_GROUPS
    passes = 2 if grouped or (step.large_chip and keys >= _TWO_PASSES_LARGE) else 1
    cost.add(_run(step, node, inputs, passes))
    return cost


def _matmul(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    a, b = inputs
    M, K, N = a.shape[-2], a.shape[-1], b.shape[-1]
    cost = Cost()
    for x in inputs:
        if not _is_matrix(x):
            cost.copy(x)
    batch = math.prod(a.shape[:-2])
    if batch > 1 and math.prod(b.shape[:-2]) == 1 and a.is_row_contiguous:
        M, batch = M * batch, 1
    tiles = math.ceil(M / 16) * math.ceil(N / 16)
    split = batch == 1 and tiles <= _SPLIT_K_TILES[step.large_chip] and K // 16 >= 8 and max(M, N) <= K
    cost.add(_run(step, node, inputs, 2 if split and min(M, N) > 1 else 1))
    return cost


def _is_matrix(x: Layout) -> bool:
    """Whether the last two axes lie in row order or are transposed, perhaps with gaps between rows."""
    (rows, columns), (down, across) = x.shape[-2:], x.strides[-2:]
    return (across == 1 and (down >= columns or rows == 1)) or (down == 1 and (across >= rows or columns == 1))


def _quantized_matmul(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    cost = Cost()
    for x in inputs:
        if x.strides[-1] != 1 or x.strides[-2] != x.shape[-1]:
            cost.copy(x)
    x, words = inputs[:2]
    transposed = node.arguments[-1] if isinstance(node.arguments[-1], bool) else node.arguments[3]
    M = x.size // x.shape[-1] if len(words.shape) == 2 else x.shape[-2]
    cost.add(_run(step, node, inputs, 2 if not transposed and M < 4 and x.shape[-1] >= 1024 else 1))
    return cost


def _quantize(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    cost = Cost()
    for x in inputs:
        if not x.is_row_contiguous:
            cost.copy(x)
    cost.add(_run(step, node, inputs))
    return cost


def _update(launches: int) -> Rule:
    """Rules for kernels that write a part of a buffer in place, if nothing else needs it any more."""

    def rule(step: Step, node: Node, inputs: list[Layout]) -> Cost:
        buffer, *rest = inputs
        read = sum(x.nbytes for x in rest)
        cost = Cost(launches, 0, read, read)
        others = [one for one in step.graph.nodes if node.inputs[0] in one.inputs and one is not node]
        if others or not buffer.is_dense:
            cost.copy(buffer)
        elif node.inputs[0] not in step.updated:
            cost.launches_in_flight += 1
            cost.bytes_in_flight += 2 * buffer.nbytes
        step.updated.update(node.outputs)
        return cost

    return rule


def _gather(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    cost = _run(step, node, inputs[1:])
    cost.bytes_read += cost.bytes_written
    return cost


def _concatenate(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    return _run(step, node, inputs, sum(x.size > 0 for x in inputs))


def _contiguous(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    cost = Cost()
    if not inputs[0].is_row_contiguous:
        cost.copy(inputs[0])
    return cost


def _custom(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    options: dict[str, Any] = node.arguments[0]
    cost = Cost(launches=len(node.outputs) if options["filled"] else 0)
    for x in inputs:
        if options["copies"] and not x.is_row_contiguous:
            cost.copy(x)
    cost.add(_run(step, node, inputs))
    return cost


COSTS: dict[str, tuple[Rule, str]] = {
    "Transpose": (_view(_transposed), "a view: mlx/backend/common/common.cpp, Transpose::eval"),
    "Broadcast": (_view(_broadcast), "a view: mlx/backend/common/common.cpp, Broadcast::eval"),
    "BroadcastAxes": (_view(_broadcast), "a view: mlx/backend/common/common.cpp, BroadcastAxes::eval"),
    "ExpandDims": (_view(_expanded), "a view: mlx/backend/common/common.cpp, ExpandDims::eval"),
    "Squeeze": (_view(_squeezed), "a view: mlx/backend/common/common.cpp, Squeeze::eval"),
    "Split": (_view(_same), "views: mlx/backend/common/common.cpp, Split::eval"),
    "Slice": (_view(_sliced), "a view: mlx/backend/gpu/slicing.cpp, slice_gpu"),
    "Depends": (_view(_same), "a view: mlx/backend/common/common.cpp, Depends::eval"),
    "Copy": (_view(_same), "a view: mlx/backend/common/common.cpp, Copy::eval"),
    "StopGradient": (_view(_same), "a view: mlx/backend/common/common.cpp, StopGradient::eval"),
    "Reshape": (
        _reshape,
        "a view, or a copy: mlx/backend/common/common.cpp, prepare_reshape; gpu/copy.cpp, reshape_gpu",
    ),
    "Flatten": (_reshape, "as Reshape: mlx/backend/gpu/primitives.cpp, Flatten::eval_gpu"),
    "Unflatten": (_reshape, "as Reshape: mlx/backend/gpu/primitives.cpp, Unflatten::eval_gpu"),
    "Contiguous": (_contiguous, "a view, or a copy: mlx/backend/gpu/primitives.cpp, Contiguous::eval_gpu"),
    "elementwise": (_elementwise, "mlx/backend/metal/unary.cpp, binary.cpp, ternary.cpp; AsType: gpu/primitives.cpp"),
    "Compiled": (_elementwise, "mlx/backend/metal/compiled.cpp, Compiled::eval_gpu; what is fused: mlx/compile.cpp"),
    "Full": (_plain, "mlx/backend/gpu/primitives.cpp, Full::eval_gpu"),
    "Arange": (_plain, "mlx/backend/metal/primitives.cpp, Arange::eval_gpu"),
    "ArgReduce": (_plain, "mlx/backend/metal/primitives.cpp, ArgReduce::eval_gpu"),
    "RMSNorm": (
        _rows,
        "copies rows that do not follow one another: mlx/backend/metal/normalization.cpp, RMSNorm::eval_gpu",
    ),
    "Softmax": (_rows, "mlx/backend/metal/softmax.cpp, Softmax::eval_gpu"),
    "LogSumExp": (_rows, "mlx/backend/metal/logsumexp.cpp, LogSumExp::eval_gpu"),
    "RoPE": (_rope, "mlx/backend/metal/rope.cpp, RoPE::eval_gpu"),
    "ScaledDotProductAttention": (
        _attention,
        "one or two passes, and copies: mlx/backend/metal/scaled_dot_product_attention.cpp, eval_gpu",
    ),
    "Matmul": (_matmul, "one, or two if split along K: mlx/backend/metal/matmul.cpp, Matmul::eval_gpu, steel_matmul"),
    "QuantizedMatmul": (
        _quantized_matmul,
        "one, or two if split along K: mlx/backend/metal/quantized.cpp, QuantizedMatmul::eval_gpu, qvm_split_k",
    ),
    "Quantize": (_quantize, "mlx/backend/metal/quantized.cpp, fast::Quantize::eval_gpu"),
    "AffineQuantize": (_quantize, "mlx/backend/metal/quantized.cpp, fast::Quantize::eval_gpu"),
    "SliceUpdate": (
        _update(1),
        "one, and a copy if not in place: mlx/backend/metal/indexing.cpp, SliceUpdate::eval_gpu",
    ),
    "DynamicSliceUpdate": (
        _update(2),
        "offset and copy: mlx/backend/gpu/primitives.cpp, DynamicSliceUpdate::eval_gpu; metal/slicing.cpp, "
        "compute_dynamic_offset",
    ),
    "ScatterAxis": (
        _update(1),
        "one, and a copy if not in place: mlx/backend/metal/indexing.cpp, ScatterAxis::eval_gpu",
    ),
    "Scatter": (_update(1), "one, and a copy if not in place: mlx/backend/metal/indexing.cpp, Scatter::eval_gpu"),
    "Gather": (_gather, "mlx/backend/metal/indexing.cpp, Gather::eval_gpu"),
    "GatherAxis": (_gather, "mlx/backend/metal/indexing.cpp, GatherAxis::eval_gpu"),
    "Concatenate": (_concatenate, "one for each input: mlx/backend/metal/slicing.cpp, concatenate_gpu"),
    "CustomKernel": (
        _custom,
        "copies what is not in row order: mlx/backend/metal/custom_kernel.cpp, CustomKernel::eval_gpu",
    ),
}
