"""The contestants of a benchmark: this package and its peer, on the same weights."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..cache.config import CacheConfig, kv_group_size
from ..config import OpenELMConfig
from ..generation.engine import PREFILL_CHUNK, DecodeBatch, as_prompt
from ..generation.sampling import SamplingConfig
from ..loading import assemble
from ..machine.compiler import use_private_folder
from ..machine.device import pays_to_compile, written_dtype
from ..model.openelm import OpenELM, parameter_shapes
from ..quantization import Quantization


@dataclass(frozen=True)
class Run:
    """Time, memory and tokens of one measured generation."""

    first_token_seconds: float  # until all rows have their first token
    decode_seconds: float  # for the tokens after the first
    peak_memory_bytes: int  # of MLX's arrays, including weights
    tokens: list[list[int]]  # generated ids of each row


class Contestant(Protocol):
    """Continues prompts as fast as it can."""

    name: str

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int, cache: CacheConfig) -> Run:
        """Continue all prompts at once, each by `max_tokens` greedy tokens."""
        ...


class Ours:
    """This package.

    Args:
        compiled: whether to compile the whole step; by default, where it pays off.
    """

    name = "openelm-mlx"

    def __init__(self, network: OpenELM, compiled: bool | None = None):
        self.network = network
        self._compiled = compiled

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int, cache: CacheConfig) -> Run:
        """See `Contestant`."""
        compiled = pays_to_compile(max_tokens) if self._compiled is None else self._compiled
        given = [as_prompt(self.network, prompt) for prompt in prompts]
        with _memory_watched() as peak:
            started = time.perf_counter()
            rows = DecodeBatch(self.network, SamplingConfig(), compiled=compiled)
            numbers = [rows.add(ids, self.network.make_cache(cache)) for ids in given]
            steps = [rows.step(more=max_tokens > 1)]
            first = time.perf_counter()
            steps += [rows.step(more=left > 1) for left in range(max_tokens - 1, 0, -1)]
            done = time.perf_counter()
        tokens = [[step[number].token for step in steps] for number in numbers]
        return Run(first - started, done - first, peak(), tokens)


class Peer:
    """Stock mlx-lm, with the weights of this package's network."""

    name = "mlx-lm"

    def __init__(self, network: OpenELM):
        from mlx_lm.models.openelm import Model, ModelArgs

        use_private_folder()  # mlx-lm compiles functions too

        self.model = Model(ModelArgs.from_dict(network.config.to_dict()))
        packed = {
            path: {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
            for path, layer in network.named_modules()
            if hasattr(layer, "bits")
        }
        if packed:
            nn.quantize(self.model, class_predicate=lambda path, _: packed.get(path, False))
        dtype = network.transformer.norm.weight.dtype  # that of all values; ours may keep scales in fewer bits
        own: Any = tree_flatten(network.parameters())
        parameters = [(n, a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a) for n, a in own]
        self.model.load_weights(parameters)

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int, cache: CacheConfig) -> Run:
        """See `Contestant`."""
        return (self._alone if len(prompts) == 1 else self._together)(prompts, max_tokens, cache)

    def _alone(self, prompts: Sequence[Sequence[int]], max_tokens: int, cache: CacheConfig) -> Run:
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        options: dict[str, Any] = {}
        if cache.bits is not None:
            head_dim = self.model.args.head_dim
            options = {"kv_bits": cache.bits, "kv_group_size": kv_group_size(head_dim)}
            options["quantized_kv_start"] = cache.quantize_after
        with _memory_watched() as peak:
            started = time.perf_counter()
            kept = make_prompt_cache(self.model, cache.window)
            steps = generate_step(
                mx.array(list(prompts[0])), self.model, max_tokens=max_tokens, prompt_cache=kept, **options
            )
            tokens = [int(next(steps)[0])]
            first = time.perf_counter()
            tokens += [int(token) for token, _ in steps]
            done = time.perf_counter()
        return Run(first - started, done - first, peak(), [tokens])

    def _together(self, prompts: Sequence[Sequence[int]], max_tokens: int, cache: CacheConfig) -> Run:
        from mlx_lm.generate import BatchGenerator

        with _memory_watched() as peak:
            started = time.perf_counter()
            generator = BatchGenerator(
                self.model,
                completion_batch_size=len(prompts),
                prefill_batch_size=len(prompts),
                prefill_step_size=PREFILL_CHUNK,
            )
            numbers = generator.insert([list(prompt) for prompt in prompts], [max_tokens] * len(prompts))
            tokens: dict[int, list[int]] = {number: [] for number in numbers}
            first = 0.0
            while responses := generator.next_generated():
                for response in responses:
                    tokens[response.uid].append(int(response.token))
                first = first or (time.perf_counter() if all(tokens.values()) else 0.0)
            done = time.perf_counter()
            generator.close()
        return Run(first - started, done - first, peak(), list(tokens.values()))


def random_network(config: OpenELMConfig, dtype: mx.Dtype, quantization: Quantization | None = None) -> OpenELM:
    """A network with random weights, which is as fast as a trained one."""
    arrays: dict[str, mx.array] = {}
    packed: dict[str, Quantization] = {}
    keys = iter(mx.random.split(mx.random.key(0), len(parameter_shapes(config))))
    for name, shape in parameter_shapes(config).items():
        key = next(keys)
        if len(shape) == 1:
            arrays[name] = mx.ones(shape, dtype)
            continue
        matrix = mx.random.normal(shape, dtype, scale=shape[-1] ** -0.5, key=key)
        path = name.removesuffix(".weight")
        if quantization is not None and quantization.fits(shape):
            packed[path] = quantization
            stored = matrix.astype(written_dtype(dtype))  # as `convert` would write it
            arrays.update({f"{path}.{part}": array for part, array in quantization.quantize(stored).items()})
        else:
            arrays[name] = matrix
        mx.eval(list(arrays.values()))
    return assemble(config, arrays, packed, dtype)


@contextmanager
def _memory_watched() -> Iterator[Any]:
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    yield mx.get_peak_memory
