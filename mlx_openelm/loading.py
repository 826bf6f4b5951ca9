"""Loading models into memory from any supported format, converted or not."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .config import OpenELMConfig
from .conversion.open import open_model
from .conversion.source import Source
from .errors import ConfigError, TokenizerError
from .generation.defaults import sampling_of
from .hub import BUILT_IN_MODEL
from .machine.device import DTYPES, compute_dtype, on_cpu
from .model.adapters import SavedAdapter, apply_adapter
from .model.cpu_layers import narrowed, plain_layers, quantized_layers
from .model.openelm import OpenELM
from .quantization import PackedTensor, Quantization
from .tensors import LazyTensor, checked_cast
from .tokenizer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_UNDER_WAY = 50  # a model is cast in such parts of it, or tensor by tensor


def load(
    model: str | Path = BUILT_IN_MODEL,
    *,
    dtype: mx.Dtype | None = None,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
) -> tuple[OpenELM, Tokenizer]:
    """Load a model and its tokenizer.

    `model.sampling` is what its `generation_config.json` says, which `generate` and `Chat` use unless they get another.

    Args:
        model: a folder or hub id (written by `convert`, from Apple, the MLX community or Apple's MLX port), or a
            CoreNet `.pt` file; by default the small model included in the package.
        dtype: type to compute in; by default float32 on the CPU, where 16-bit types are slow, and on a GPU the stored
            type, but bfloat16 for float32, which would take twice the time per token (`convert` does the same).
        tokenizer: file, folder or hub id of another tokenizer.
        config: the configuration, if the source lacks one; see `convert`.
        revision: branch, tag or commit on the hub, also for `tokenizer`.
        adapter: adapter to apply: a folder written by `tune`, mlx-lm or PEFT, or a CoreNet `.pt` file.

    Raises:
        TokenizerError: if the model has no tokenizer; `load_model` loads the network alone.
        OpenELMError: another subclass, if anything is missing, damaged or contradictory.
    """
    opened = open_model([model], tokenizer=tokenizer, config=config, revision=revision)
    if opened.tokenizer is None:
        raise TokenizerError(
            "`tokenizer=none` leaves the tokenizer out, but text needs one; name one, or leave `tokenizer` out"
            if tokenizer == "none"
            else f"{model} has no tokenizer; set `tokenizer` to a file, a folder or a hub id"
        )
    found = _adapter(adapter, opened.source)
    if found is not None:
        found.prepare(opened.tokenizer)
    return _network(opened.source, dtype, found), opened.tokenizer


def load_model(
    model: str | Path = BUILT_IN_MODEL,
    *,
    dtype: mx.Dtype | None = None,
    config: str | Path | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
) -> OpenELM:
    """Load a network without its tokenizer; see `load`.

    Raises:
        OpenELMError: a subclass, if anything is missing, damaged or contradictory.
    """
    opened = open_model([model], tokenizer="none", config=config, revision=revision)
    return _network(opened.source, dtype, _adapter(adapter, opened.source))


def _adapter(path: str | Path | None, source: Source) -> SavedAdapter | None:
    if path is None:
        return None
    from .conversion.adapters.forms import open_adapter

    return open_adapter(path, vocab_size=source.config.vocab_size)


def _network(source: Source, dtype: mx.Dtype | None, adapter: SavedAdapter | None) -> OpenELM:
    sampling = sampling_of(source.sampling, Path(source.folder or source.name) / "generation_config.json")
    network = load_source(source, dtype)
    network.sampling = sampling
    if adapter is not None:
        apply_adapter(network, adapter)
        network.eval()
    return network


def dtype_named(name: str) -> mx.Dtype | None:
    """The dtype of this name; `None` for `auto`, which leaves the choice to `load`.

    Raises:
        ConfigError: if the name is unknown.
    """
    if name != "auto" and name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r} (choose from auto, {', '.join(DTYPES)})")
    return DTYPES.get(name)


def load_source(source: Source, dtype: mx.Dtype | None = None) -> OpenELM:
    """Load the network of an opened source, to compute in `dtype`; by default in that of `load`.

    Raises:
        WeightsError: if a tensor contains NaN or infinity, or values that `dtype` cannot hold.
    """
    started = time.perf_counter()
    dtype = dtype or compute_dtype(source.tensors["transformer.norm.weight"].dtype)
    packed = {
        name.removesuffix(".weight"): tensor.quantization
        for name, tensor in source.tensors.items()
        if isinstance(tensor, PackedTensor)
    }
    arrays: dict[str, mx.array] = {}
    under_way: deque[mx.array] = deque()
    for name, lazy in _parameters(source, dtype):
        arrays[name] = lazy.read()
        mx.async_eval(arrays[name])  # while it is cast, the next one is read
        under_way.append(arrays[name])
        while len(under_way) > 1 and sum(array.nbytes for array in under_way) > source.nbytes // _UNDER_WAY:
            mx.eval(under_way.popleft())  # then the values that it was cast from are freed
    network = assemble(source.config, arrays, packed, dtype)
    mx.clear_cache()  # a GPU keeps what was freed
    seconds, kind = time.perf_counter() - started, str(dtype).rpartition(".")[2]
    _log.debug("loaded %s in %.2f s: %s bytes, to compute in %s", source.name, seconds, f"{source.nbytes:,}", kind)
    return network


def _parameters(source: Source, dtype: mx.Dtype) -> Iterator[tuple[str, LazyTensor]]:
    """All parameters of a source with their names, in `dtype` once they are read."""
    for name, tensor in source.tensors.items():
        if isinstance(tensor, PackedTensor):
            path = name.removesuffix(".weight")
            yield from ((f"{path}.{part}", lazy) for part, lazy in tensor.cast(path, dtype).parts.items())
        else:
            yield name, tensor.map(partial(checked_cast, name, dtype=dtype), dtype)


def assemble(
    config: OpenELMConfig, arrays: Mapping[str, mx.array], packed: Mapping[str, Quantization], dtype: mx.Dtype
) -> OpenELM:
    """A network with these weights, computing in `dtype`.

    Args:
        arrays: weights by parameter name; a quantized matrix as `PATH.weight`, `PATH.scales` and, if affine,
            `PATH.biases`.
        packed: quantization of each quantized matrix, by path.
    """
    model = OpenELM(config)
    if packed and on_cpu():
        quantized_layers(model, packed, dtype)
    elif packed:
        nn.quantize(model, class_predicate=lambda path, _: packed[path].to_dict() if path in packed else False)
    if on_cpu():
        plain_layers(model)
    packed_types = (mx.uint32, mx.uint8)
    arrays = {n: a if a.dtype in packed_types else a.astype(dtype) for n, a in arrays.items()}
    if packed and on_cpu():
        arrays = {n: narrowed(a) if n.endswith((".scales", ".biases")) else a for n, a in arrays.items()}
    mx.eval(list(arrays.values()))
    model.load_weights(list(arrays.items()))
    model.eval()
    return model
