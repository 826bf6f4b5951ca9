"""What each primitive costs on Metal: kernels started, copies among them, and bytes, by reading MLX's source.

`COSTS` says for each primitive where in MLX (0.32, `ml-explore/mlx`) its cost stands. Strides are followed through
views, because many kernels copy inputs that are not contiguous.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from memory_layout import Layout, Strides, contiguous, reshaped
from step_graph import ELEMENTWISE, Graph, Node

_TWO_PASSES_WITH_GROUPS = 4096  # keys from which attention takes two kernels, if queries share keys
_TWO_PASSES_LARGE = 1024  # the same on the larger chips
_SPLIT_K_TILES = 1024, 2048  # tiles of 16 x 16 up to which a product is split along K; the second on larger chips


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
    large_chip: bool = False  # Max and Ultra
    layouts: dict[str, Layout] = field(default_factory=dict)
    total: Cost = field(default_factory=Cost)
    by_name: dict[str, Cost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.made = {name for node in self.graph.nodes for name in node.outputs}
        self.uses = Counter(name for node in self.graph.nodes for name in {*node.inputs})

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
    """Kernels that read these arrays, or this number of bytes, and write all outputs."""
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
    strides = reshaped(inputs[0], value.shape)
    cost = Cost()
    if strides is None:
        strides = contiguous(value.shape)
        cost.copy(inputs[0])
    step.layouts[name] = Layout(value, strides)
    return cost


def _elementwise(step: Step, node: Node, inputs: list[Layout]) -> Cost:
    """The result lies as its inputs do, if all lie in the same way, and else in row order."""
    outputs = [step.graph.values[name] for name in node.outputs]
    whole = [x for x in inputs if x.size > 1]
    if whole and all(x.shape == outputs[0].shape for x in whole):
        alike = all(x.is_dense and x.strides == whole[0].strides for x in whole)
        if alike or all(x.is_row_contiguous for x in whole):
            for name, value in zip(node.outputs, outputs, strict=True):
                step.layouts[name] = Layout(value, whole[0].strides)
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
    if _options(node)["dims"] < shape[-1] or not (x.is_row_contiguous or three or swapped):
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
        if x.strides[-1] != 1 or x.strides[-2:-1] not in ((), (x.shape[-1],)):
            cost.copy(x)
    x, words = inputs[:2]
    transposed = node.arguments[-1]
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


def _update(launches: int, position: int) -> Rule:
    """A rule for a kernel that writes its input at a position into a part of a buffer, if nothing else needs that."""

    def rule(step: Step, node: Node, inputs: list[Layout]) -> Cost:
        buffer, *rest = inputs
        cost = Cost(launches, 0, sum(x.nbytes for x in rest), inputs[position].nbytes)
        if step.uses[node.inputs[0]] > 1 or not buffer.is_dense:
            cost.copy(buffer)
        elif node.inputs[0] not in step.made:
            cost.launches_in_flight += 1
            cost.bytes_in_flight += 2 * buffer.nbytes
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
    options = _options(node)
    cost = Cost(launches=len(node.outputs) if options["filled"] else 0)
    for x in inputs:
        if options["copies"] and not x.is_row_contiguous:
            cost.copy(x)
    cost.add(_run(step, node, inputs))
    return cost


def _options(node: Node) -> dict[str, Any]:
    assert node.options is not None, f"{node.name} does not come from a stand-in"
    return node.options


_COMMON, _GPU, _METAL = (f"mlx/backend/{folder}/" for folder in ("common", "gpu", "metal"))
_BUFFER = "and a copy of the buffer if that is still in use"

COSTS: dict[str, tuple[Rule, str]] = {
    "Transpose": (_view(_transposed), f"a view: {_COMMON}common.cpp, Transpose::eval"),
    "Broadcast": (_view(_broadcast), f"a view: {_COMMON}common.cpp, Broadcast::eval"),
    "ExpandDims": (_view(_expanded), f"a view: {_COMMON}common.cpp, ExpandDims::eval"),
    "Squeeze": (_view(_squeezed), f"a view: {_COMMON}common.cpp, Squeeze::eval"),
    "Split": (_view(_same), f"views: {_COMMON}common.cpp, Split::eval"),
    "Slice": (_view(_sliced), f"a view: {_GPU}slicing.cpp, slice_gpu; {_COMMON}slicing.cpp, slice"),
    "Depends": (_view(_same), f"a view: {_COMMON}common.cpp, Depends::eval"),
    "Reshape": (_reshape, f"a view, or a copy: {_COMMON}common.cpp, prepare_reshape; {_GPU}copy.cpp, reshape_gpu"),
    "Flatten": (_reshape, f"as Reshape: {_GPU}primitives.cpp, Flatten::eval_gpu"),
    "Unflatten": (_reshape, f"as Reshape: {_GPU}primitives.cpp, Unflatten::eval_gpu"),
    "Contiguous": (_contiguous, f"a view, or a copy: {_GPU}primitives.cpp, Contiguous::eval_gpu"),
    "elementwise": (
        _elementwise,
        f"one: {_METAL}unary.cpp, binary.cpp, ternary.cpp; {_GPU}primitives.cpp, AsType::eval_gpu",
    ),
    "Compiled": (
        _elementwise,
        f"one, whose result lies as its inputs do: {_METAL}compiled.cpp, Compiled::eval_gpu; {_COMMON}compiled.cpp, "
        "compiled_allocate_outputs; what is fused: mlx/compile.cpp, compile_fuse",
    ),
    "Full": (_plain, f"one: {_GPU}primitives.cpp, Full::eval_gpu"),
    "Arange": (_plain, f"one: {_METAL}primitives.cpp, Arange::eval_gpu"),
    "ArgReduce": (_plain, f"one: {_METAL}primitives.cpp, ArgReduce::eval_gpu"),
    "RMSNorm": (_rows, f"one, and a copy if rows have gaps: {_METAL}normalization.cpp, RMSNorm::eval_gpu"),
    "Softmax": (_rows, f"one, and a copy if rows have gaps: {_METAL}softmax.cpp, Softmax::eval_gpu"),
    "LogSumExp": (_rows, f"one, and a copy if rows have gaps: {_METAL}logsumexp.cpp, LogSumExp::eval_gpu"),
    "RoPE": (
        _rope,
        f"one, and a copy of what is neither in row order nor transposed: {_METAL}rope.cpp, RoPE::eval_gpu",
    ),
    "ScaledDotProductAttention": (
        _attention,
        f"one or two passes, and copies: {_METAL}scaled_dot_product_attention.cpp, ScaledDotProductAttention::eval_gpu",
    ),
    "Matmul": (
        _matmul,
        f"one, or two if split along K: {_METAL}matmul.cpp, Matmul::eval_gpu, steel_matmul_regular_axpby, "
        "steel_gemm_splitk_axpby (as on an M1 or M2)",
    ),
    "QuantizedMatmul": (
        _quantized_matmul,
        f"one, or two if split along K, and copies of matrices whose rows have gaps: {_METAL}quantized.cpp, "
        "QuantizedMatmul::eval_gpu, ensure_row_contiguous_matrix, qvm_split_k",
    ),
    "Quantize": (_quantize, f"one, and copies: {_METAL}quantized.cpp, fast::Quantize::eval_gpu"),
    "SliceUpdate": (_update(1, 1), f"one, {_BUFFER}: {_METAL}indexing.cpp, SliceUpdate::eval_gpu"),
    "DynamicSliceUpdate": (
        _update(2, 1),
        f"the offset and the copy, {_BUFFER}: {_GPU}primitives.cpp, DynamicSliceUpdate::eval_gpu; {_METAL}slicing.cpp, "
        "compute_dynamic_offset",
    ),
    "ScatterAxis": (_update(1, 2), f"one, {_BUFFER}: {_METAL}indexing.cpp, ScatterAxis::eval_gpu"),
    "Gather": (_gather, f"one: {_METAL}indexing.cpp, Gather::eval_gpu"),
    "GatherAxis": (_gather, f"one: {_METAL}indexing.cpp, GatherAxis::eval_gpu"),
    "Concatenate": (_concatenate, f"one for each input: {_METAL}slicing.cpp, concatenate_gpu"),
    "CustomKernel": (_custom, f"one, and copies of inputs: {_METAL}custom_kernel.cpp, CustomKernel::eval_gpu"),
}
