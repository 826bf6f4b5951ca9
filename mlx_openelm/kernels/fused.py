"""Several of MLX's operations as one kernel, for one new token per row or a few.

Each function here gives what the plain formula in its docstring gives, up to rounding. `kernels_work` compares the two
on the device in use before the first step, so that a kernel that does not compile there, or is wrong, is never used.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from ..machine.device import choices
from . import sources
from .dialects import DIALECTS, TEAM

_THREADS = 256  # per row, for residual and norm
_TEAMS = 16  # per query head, for quantized attention
LONGEST_QUANTIZED = 4096  # slots; MLX's own attention divides a row among several groups from there on

_EPSILON = 1e-6  # of the norms of queries and keys
_BASE = 10_000.0  # of RoPE, in the check
_TOLERANCES = {mx.float32: 2e-3, mx.float16: 2e-2, mx.bfloat16: 1e-1}  # of numbers around 1; float32 may be TF32


def normalize_and_rotate(
    qkv: mx.array, norms: tuple[mx.array, mx.array] | None, positions: mx.array, counts: tuple[int, int], base: float
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries (B, H, L, D), keys and values (B, K, L, D) of L new tokens per row.

    Queries and keys are `rope(rms_norm(x, norm))`; the values are copied.

    Args:
        qkv: the product with the attention's first matrix, (B, L, H + 2K, D).
        norms: weights of the norms of queries and of keys, (D,); None: no norm.
        positions: of each row's first token, () or (B,) int32.
        counts: H and K.
        base: of RoPE.
    """
    B, L, _, D = qkv.shape
    H, K = counts
    shapes = [(B, H, L, D), (B, K, L, D), (B, K, L, D)]
    outputs = ("queries", "keys", "values")
    queries, keys, values = _rotating("normalize_and_rotate", sources.NORMALIZE_AND_ROTATE, outputs)(
        inputs=_rotating_inputs(qkv, norms, positions, counts, base),
        template=[("T", qkv.dtype), ("D", D), ("NORMALIZED", norms is not None)],
        grid=(B * L * (H + 2 * K) * TEAM, 1, 1),
        threadgroup=(TEAM, 1, 1),
        output_shapes=shapes,
        output_dtypes=[qkv.dtype] * 3,
    )
    return queries, keys, values


def normalize_rotate_and_quantize(
    qkv: mx.array,
    norms: tuple[mx.array, mx.array] | None,
    positions: mx.array,
    counts: tuple[int, int],
    base: float,
    bits: int,
    group_size: int,
) -> tuple[mx.array, tuple[mx.array, ...]]:
    """As `normalize_and_rotate`, but keys and values are quantized: words, scales and biases of each.

    They are those of `mx.quantize`, (B, K, L, ...): three arrays of the keys, then three of the values.
    """
    B, L, _, D = qkv.shape
    H, K = counts
    parts = [(B, K, L, D * bits // 32), (B, K, L, D // group_size), (B, K, L, D // group_size)]
    outputs = ("queries", *(f"{of}_{part}" for of in ("key", "value") for part in ("words", "scales", "biases")))
    queries, *quantized = _rotating("normalize_rotate_quantize", sources.NORMALIZE_ROTATE_AND_QUANTIZE, outputs)(
        inputs=_rotating_inputs(qkv, norms, positions, counts, base),
        template=[
            ("T", qkv.dtype),
            ("D", D),
            ("NORMALIZED", norms is not None),
            ("BITS", bits),
            ("GROUP", group_size),
        ],
        grid=(B * L * (H + 2 * K) * TEAM, 1, 1),
        threadgroup=(TEAM, 1, 1),
        output_shapes=[(B, H, L, D), *parts, *parts],
        output_dtypes=[qkv.dtype, *[mx.uint32, qkv.dtype, qkv.dtype] * 2],
    )
    return queries, tuple(quantized)


def add_and_normalize(x: mx.array, update: mx.array, weight: mx.array, epsilon: float) -> tuple[mx.array, mx.array]:
    """`x + update` and `rms_norm(x + update, weight)`, each (..., M) as `x`; `weight` (M,)."""
    M = x.shape[-1]
    kernel = _kernel(
        "add_and_normalize", ("x", "update", "weight", "epsilon"), ("sum", "normed"), sources.ADD_AND_NORMALIZE
    )
    total, normed = kernel(
        inputs=[x, update, weight, _numbers(epsilon)],
        template=[("T", x.dtype), ("M", M), ("THREADS", _THREADS)],
        grid=(x.size // M * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[x.dtype, x.dtype],
    )
    return total, normed


def attend_quantized(
    queries: mx.array,
    buffers: tuple[mx.array, ...],
    last: mx.array,
    first: mx.array | None,
    bits: int,
    group_size: int,
) -> mx.array:
    """Attention output (B, H, 1, D) of one query per row over quantized keys and values.

    It is `softmax(D**-0.5 * queries @ keys.T) @ values` over the slots from `first` to `last`, dequantized in float32.

    Args:
        queries: (B, H, 1, D).
        buffers: words, scales and biases (B, K, S, ...) of the keys, then of the values.
        last: slot of the newest token, () int32.
        first: first slot of each row, (B,) int32; None: slot 0.
    """
    B, H, _, D = queries.shape
    K, S = buffers[0].shape[1:3]
    names = (f"{of}_{part}" for of in ("key", "value") for part in ("words", "scales", "biases"))
    inputs = ("queries", *names, "last", "first", "sizes", "scale")
    (read,) = _kernel("attend_quantized", inputs, ("read",), sources.ATTEND_QUANTIZED)(
        inputs=[
            queries,
            *buffers,
            last.reshape(1),
            _integers(0) if first is None else first,
            _integers(H, K, S, int(first is not None)),
            _numbers(D**-0.5),
        ],
        template=[("T", queries.dtype), ("D", D), ("BITS", bits), ("GROUP", group_size), ("TEAMS", _TEAMS)],
        grid=(B * H * _TEAMS * TEAM, 1, 1),
        threadgroup=(_TEAMS * TEAM, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return read


def can_attend_quantized(head_dim: int, slots: int) -> bool:
    """Whether `attend_quantized` takes heads of this width, and pays for this many slots."""
    return head_dim % TEAM == 0 and slots <= LONGEST_QUANTIZED


def kernels_work(dtype: mx.Dtype, head_dim: int, model_dim: int) -> bool:
    """Whether the kernels are wanted on this device, compile there, and agree with the plain formulas.

    Warns:
        UserWarning: once, if they are wanted and do not.
    """
    backend = choices().backend
    if not choices().fused_kernels or backend not in DIALECTS or dtype not in _TOLERANCES or head_dim % 2:
        return False
    return _checked(backend, dtype, head_dim, model_dim)


def forget_kernels() -> None:
    """Create and check all kernels again at their next use."""
    _kernel_of.cache_clear()
    _checked.cache_clear()


@cache
def _checked(backend: str, dtype: mx.Dtype, head_dim: int, model_dim: int) -> bool:
    try:
        error = _largest_error(dtype, head_dim, model_dim)
        problem = None if error <= _TOLERANCES[dtype] else f"their results differ by {error:.2g}"
    except (RuntimeError, ValueError) as failure:
        problem = str(failure).strip().split("\n")[0]
    if problem is not None:
        warnings.warn(
            f"the fused kernels do not work on this device ({problem}); MLX's own operations are used, which are "
            "somewhat slower; please report this, with the self-test of `openelm-mlx doctor`",
            stacklevel=3,
        )
    return problem is None


def _largest_error(dtype: mx.Dtype, D: int, M: int) -> float:
    """The largest difference between the kernels and the plain formulas, for two rows of random numbers around 1."""
    keys = iter(mx.random.split(mx.random.key(0), 6))
    qkv = mx.random.normal((2, 1, 4, D), dtype, key=next(keys))
    norms = mx.random.normal((D,), dtype, key=next(keys)), mx.random.normal((D,), dtype, key=next(keys))
    positions = mx.array([5, 1000], mx.int32)
    plain = _plainly_rotated(qkv, norms, positions)
    pairs = [*zip(normalize_and_rotate(qkv, norms, positions, (2, 1), _BASE), plain, strict=True)]
    x, update, weight = (mx.random.normal(shape, dtype, key=next(keys)) for shape in ((2, M), (2, M), (M,)))
    total = x + update
    expected = total, mx.fast.rms_norm(total, weight, _EPSILON)
    pairs += zip(add_and_normalize(x, update, weight, _EPSILON), expected, strict=True)
    errors = [_difference(*pair).max() for pair in pairs]
    for group_size in [size for size in (64, 32) if D % size == 0][:1]:
        for bits in (4, 8):
            queries, parts = normalize_rotate_and_quantize(qkv, norms, positions, (2, 1), _BASE, bits, group_size)
            values = _dequantized(parts[3:], bits, group_size)
            read = attend_quantized(queries, parts, mx.array(0, mx.int32), None, bits, group_size)
            errors.append(_difference(queries, plain[0]).max())
            errors.append(_difference(read, mx.broadcast_to(values, read.shape)).max())  # of one token: its value
            for three, part in ((parts[:3], plain[1]), (parts[3:], plain[2])):
                stock = _dequantized(mx.quantize(part, group_size, bits), bits, group_size)
                # A number between two codes may get either.
                errors.append(_difference(_dequantized(three, bits, group_size), stock).mean())
    return float(mx.max(mx.stack(errors)))


def _dequantized(packed: Sequence[mx.array], bits: int, group_size: int) -> mx.array:
    words, scales, biases = packed
    return mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)


def _difference(one: mx.array, other: mx.array) -> mx.array:
    return mx.abs(one.astype(mx.float32) - other.astype(mx.float32))


def _plainly_rotated(
    qkv: mx.array, norms: tuple[mx.array, mx.array], positions: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    queries, keys, values = mx.split(qkv.swapaxes(1, 2), [2, 3], axis=1)
    queries, keys = (
        mx.fast.rope(
            mx.fast.rms_norm(heads, norm, _EPSILON),
            heads.shape[-1],
            traditional=False,
            base=_BASE,
            scale=1.0,
            offset=positions,
        )
        for heads, norm in zip((queries, keys), norms, strict=True)
    )
    return queries, keys, values


def _rotating(name: str, source: str, outputs: tuple[str, ...]) -> Callable[..., Any]:
    return _kernel(name, ("qkv", "query_norm", "key_norm", "positions", "sizes", "rotation"), outputs, source)


def _rotating_inputs(
    qkv: mx.array, norms: tuple[mx.array, mx.array] | None, positions: mx.array, counts: tuple[int, int], base: float
) -> list[mx.array]:
    L = qkv.shape[1]
    query_norm, key_norm = norms or (qkv, qkv)  # not read without norms
    own = positions.ndim > 0
    positions = positions if own else positions.reshape(1)
    return [qkv, query_norm, key_norm, positions, _integers(*counts, L, int(own)), _numbers(math.log2(base), _EPSILON)]


def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], body: str) -> Callable[..., Any]:
    return _kernel_of(choices().backend, name, inputs, outputs, body)


@cache
def _kernel_of(
    backend: str, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], body: str
) -> Callable[..., Any]:
    dialect = DIALECTS[backend]
    create: Any = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    kernel: Callable[..., Any] = create(
        name=f"openelm_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=dialect.prologue + body,
        header=dialect.header,
    )
    return kernel


@cache
def _integers(*values: int) -> mx.array:
    return _evaluated(mx.array(values, mx.int32))


@cache
def _numbers(*values: float) -> mx.array:
    return _evaluated(mx.array(values, mx.float32))


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)  # a constant of every step, not a part of its graph
    return array
