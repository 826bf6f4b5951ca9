"""How many kernels a Metal GPU has to start for one token, counted without one: this package against mlx-lm.

The graph of a decoding step is built with the choices for Metal and exported, never evaluated; each of its primitives
costs what MLX's source says (`metal_costs.py`). Weights take no memory.

python benchmarks/launches.py [--size 270M,1.1B] [--bits 0,4] [--rows 1,4] [--kv full,8,4,window] [--tokens 500] [--detail]
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from common import report
from metal_costs import Step, count
from mlx.utils import tree_flatten
from step_graph import Graph, Recorder, as_on_metal, blank, drawn, fused, traced

from mlx_openelm import CacheConfig, OpenELMConfig, SamplingConfig
from mlx_openelm.cache.config import kv_group_size
from mlx_openelm.cache.kv_cache import KVCache
from mlx_openelm.generation import engine
from mlx_openelm.generation.sampling import Sampler
from mlx_openelm.loading import assemble
from mlx_openelm.machine.device import replaced_choices
from mlx_openelm.model.openelm import OpenELM, parameter_shapes
from mlx_openelm.quantization import Quantization

SIZES = ("270M", "450M", "1.1B", "3B")
KINDS = ("full", "8", "4", "window")
WINDOW = 512  # tokens
TOKENS = 500  # before the step
DTYPE = mx.bfloat16
_VIEWS = {"Transpose", "Broadcast", "ExpandDims", "Squeeze", "Split", "Slice"}


@dataclass(frozen=True)
class Case:
    """A step to count."""

    size: str
    bits: int  # of the weights; 0: bfloat16
    rows: int
    kv: str  # one of KINDS
    tokens: int = TOKENS
    large_chip: bool = False  # Max and Ultra

    @property
    def cache(self) -> CacheConfig:
        """How this package stores keys and values."""
        if self.kv == "window":
            return CacheConfig(window=WINDOW)
        return CacheConfig() if self.kv == "full" else CacheConfig(bits=int(self.kv))

    @property
    def held(self) -> int:
        """Tokens in the cache; a window is full, and has turned."""
        return self.tokens + 2 * WINDOW if self.kv == "window" else self.tokens


class Counted(Exception):
    """A step is built, and is not to be evaluated."""


def our_step(case: Case, choices: dict[str, Any] | None = None) -> Step:
    """The costs of this package's step.

    Args:
        choices: replaces those that `machine/device.py` makes for Metal.
    """
    graphs: list[Graph] = []
    with as_on_metal() as recorder, replaced_choices(backend="metal", **(choices or {})):
        network = _network(OpenELMConfig.preset(case.size), case.bits)
        cache = _filled_cache(network, case)
        sampler = Sampler(SamplingConfig())
        states = [sampler.start(mx.array([5]), seed=0) for _ in range(case.rows)]
        state = tuple(mx.stack(list(parts)) for parts in zip(*states, strict=True))
        mx.eval(state)
        with mock.patch.object(engine, "compile_function", _capturing(graphs, recorder)):
            step = engine.DecodeStep(network, lambda logits, state: sampler.choose_rows(logits[:, -1], state), True)
            chosen = step(blank((case.rows,), mx.uint32)[:, None], state, cache)
        _check(graphs[0], drawn([array for _, array in tree_flatten(chosen)] + cache.arrays))  # type: ignore[union-attr]
        return count(graphs[0], case.large_chip)


def peer_step(case: Case) -> Step:
    """The costs of mlx-lm's step."""
    from mlx_lm.models import openelm as peer

    with as_on_metal() as recorder, mock.patch.object(peer, "swiglu", recorder.swiglu):
        model = _peer_model(OpenELMConfig.preset(case.size), case.bits)
        build = _peer_rows if case.rows > 1 else _peer_alone

        graph = traced(lambda *_: build(model, case), [], recorder)
        _check(graph, drawn(build(model, case)))
        return count(graph, case.large_chip)


def is_possible(case: Case) -> bool:
    """Whether both packages can do it: rows of a batch have neither windows nor, in mlx-lm, quantized keys."""
    return case.rows == 1 or case.kv == "full"


def _capturing(graphs: list[Graph], recorder: Recorder) -> Callable[..., Any]:
    """In place of `compile_function`: the fused graph is kept."""

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            graphs.append(fused(traced(function, list(arguments), recorder)))
            return mx.compile(function)(*arguments)

        return run

    return compile_function


def _check(graph: Graph, names: Counter[str]) -> None:
    """Make sure that the graph that is counted is the one that MLX would evaluate.

    Raises:
        AssertionError: if another one has other nodes, except views around it.
    """
    expected = Counter(
        "Depends" if node.arguments and isinstance(node.arguments[0], dict) else node.name for node in graph.nodes
    )
    more, fewer = names - expected, expected - names
    assert not fewer and set(more) <= _VIEWS, f"MLX's own graph has {dict(more)} more and {dict(fewer)} fewer"


def _network(config: OpenELMConfig, bits: int) -> OpenELM:
    """A network whose weights take no memory."""
    arrays: dict[str, mx.array] = {}
    packed: dict[str, Quantization] = {}
    quantization = Quantization(bits) if bits else None
    for name, shape in parameter_shapes(config).items():
        if quantization is not None and quantization.fits(shape):
            path = name.removesuffix(".weight")
            packed[path] = quantization
            for part, (part_shape, dtype) in quantization.plan((shape[0], shape[1]), DTYPE).items():
                arrays[f"{path}.{part}"] = blank(part_shape, dtype)
        else:
            arrays[name] = blank(shape, DTYPE)
    return assemble(config, arrays, packed, DTYPE)


def _filled_cache(network: OpenELM, case: Case) -> KVCache:
    """A cache that holds tokens, in buffers that take no memory."""
    rows = [_filled_row(network, case.cache, case.held - 10 * row) for row in range(case.rows)]
    cache, *others = rows
    for other in others:
        cache.join(other)
    buffers = cache.take_buffers(1)
    cache.restore_buffers([tuple(blank(tuple(a.shape), a.dtype) for a in layer) for layer in buffers], 0)
    return cache


def _filled_row(network: OpenELM, cache_config: CacheConfig, num_tokens: int) -> KVCache:
    config = network.config
    D = config.head_dim
    kept = min(num_tokens, cache_config.window or num_tokens)
    arrays: dict[str, mx.array] = {}
    for layer, heads in enumerate(config.num_kv_heads):
        parts = [((1, heads, kept, D), DTYPE)] * 2
        if cache_config.window is not None:
            parts.append(((1, heads, cache_config.sinks + 1, D), DTYPE))
        elif cache_config.bits is not None:
            groups = (1, heads, kept, D // kv_group_size(D))
            words = (1, heads, kept, D * cache_config.bits // 32)
            parts = [(words, mx.uint32), (groups, DTYPE), (groups, DTYPE)] * 2
        arrays.update({f"layers.{layer}.{n}": blank(shape, dtype) for n, (shape, dtype) in enumerate(parts)})
    cache = network.make_cache(cache_config)
    cache.from_arrays(arrays, num_tokens, cache_config.bits is not None)
    return cache


def _peer_model(config: OpenELMConfig, bits: int) -> Any:
    """mlx-lm's model, with weights that take no memory."""
    from mlx_lm.models.openelm import Model, ModelArgs

    model = Model(ModelArgs.from_dict(config.to_dict()))
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    parameters: Any = tree_flatten(model.parameters())
    words = {mx.uint32, mx.uint8}
    model.load_weights([(n, blank(tuple(a.shape), a.dtype if a.dtype in words else DTYPE)) for n, a in parameters])
    return model


def _peer_alone(model: Any, case: Case) -> list[mx.array]:
    """What `generate_step` evaluates for one token."""
    from mlx_lm.generate import generate_step

    kept = [_peer_cache(model, layer, case) for layer in range(len(model.layers))]
    with _captured() as arrays:
        next(generate_step(mx.array([5], mx.uint32), model, prompt_cache=kept, stream=mx.default_stream(mx.cpu)))
    return arrays


def _peer_cache(model: Any, layer: int, case: Case) -> Any:
    from mlx_lm.models import cache

    heads, D = model.args.num_kv_heads[layer], model.args.head_dim
    room = -(-(case.tokens + 1) // cache.KVCache.step) * cache.KVCache.step
    if case.kv == "window":
        kept = cache.RotatingKVCache(max_size=WINDOW, keep=CacheConfig.sinks)
        room = kept._idx = WINDOW
    elif case.kv == "full":
        kept = cache.KVCache()
    else:
        bits = int(case.kv)
        kept = cache.QuantizedKVCache(group_size=kv_group_size(D), bits=bits)
        groups = (1, heads, room, D // kept.group_size), DTYPE
        parts = [((1, heads, room, D * bits // 32), mx.uint32), groups, groups]
        kept.keys, kept.values = ([blank(*part) for part in parts] for _ in "kv")
    if case.kv in ("full", "window"):
        kept.keys, kept.values = (blank((1, heads, room, D), DTYPE) for _ in "kv")
    kept.offset = case.held
    return kept


def _peer_rows(model: Any, case: Case) -> list[mx.array]:
    """What mlx-lm's `BatchGenerator` evaluates for one token of each row."""
    from mlx_lm.generate import GenerationBatch, greedy_sampler
    from mlx_lm.models.cache import BatchKVCache

    B = case.rows
    padding = [10 * row for row in range(B)]
    kept = []
    for heads in model.args.num_kv_heads:
        cache = BatchKVCache(padding)
        room = -(-(case.tokens + 1) // cache.step) * cache.step
        cache.keys, cache.values = (blank((B, heads, room, model.args.head_dim), DTYPE) for _ in "kv")
        cache.offset = mx.array([case.tokens - pad for pad in padding])
        cache._idx = case.tokens
        kept.append(cache)
    with _captured() as arrays:
        GenerationBatch(
            model,
            list(range(B)),
            mx.zeros((B,), mx.uint32),
            kept,
            [[5]] * B,
            [None] * B,
            greedy_sampler,
            [None] * B,
            [],
            [2] * B,
        )
    return arrays


@contextmanager
def _captured() -> Iterator[list[mx.array]]:
    """Collect the first arrays that `mx.async_eval` is asked for; nothing is evaluated."""
    arrays: list[mx.array] = []

    def async_eval(*given: Any) -> None:
        arrays.extend(array for _, array in tree_flatten(list(given)))  # type: ignore[union-attr]
        raise Counted

    with mock.patch.object(mx, "async_eval", async_eval):
        try:
            yield arrays
        except Counted:
            return
        raise AssertionError("mlx-lm starts its steps in another way now")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default=",".join(SIZES))
    parser.add_argument("--bits", default="0,4", help="of the weights; 0: bfloat16")
    parser.add_argument("--rows", default="1,4")
    parser.add_argument("--kv", default=",".join(KINDS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="before the step")
    parser.add_argument("--large-chip", action="store_true", help="as for a Max or Ultra")
    parser.add_argument("--detail", action="store_true", help="by primitive")
    arguments = parser.parse_args()
    names = (arguments.size.split(","), arguments.bits.split(","), arguments.rows.split(","), arguments.kv.split(","))
    rows = [
        [
            "model",
            "weights",
            "rows",
            "keys and values",
            "",
            "launches",
            "copies",
            "read, MB",
            "written, MB",
            "in flight",
        ]
    ]
    results = []
    for size, bits, batch, kv in product(*names):
        case = Case(size, int(bits), int(batch), kv, arguments.tokens, arguments.large_chip)
        if not is_possible(case):
            continue
        steps = {"openelm-mlx": our_step(case), "mlx-lm": peer_step(case)}
        for name, step in steps.items():
            total = step.total
            weights = f"{case.bits} bits" if case.bits else "bfloat16"
            mb = [f"{number / 1e6:,.1f}" for number in (total.bytes_read, total.bytes_written)]
            late = f"+{total.launches_in_flight} launches, +{total.bytes_in_flight / 1e6:,.1f} MB"
            rows.append([size, weights, batch, kv, name, f"{total.launches:,}", f"{total.copies:,}", *mb, late])
            if arguments.detail:
                _show(name, step)
        results.append({"case": asdict(case), **{name: asdict(step.total) for name, step in steps.items()}})
    report("launches", rows, {"results": results})


def _show(name: str, step: Step) -> None:
    print(name)
    occurrences = step.graph.names()
    for primitive, cost in sorted(step.by_name.items(), key=lambda pair: -pair[1].launches):
        if cost.launches:
            print(f"  {cost.launches:5} {cost.copies:4} copies  {occurrences[primitive]:5} x {primitive}")


if __name__ == "__main__":
    main()
