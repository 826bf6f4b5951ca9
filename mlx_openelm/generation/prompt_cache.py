"""Keys and values that outlive a generation, in memory or in a file, for texts with a common prefix."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..cache.config import CacheConfig
from ..cache.kv_cache import KVCache
from ..errors import CacheError, WeightsError, one_line
from ..files.json_file import parse_json
from ..files.output import OutputFile, output_file
from ..model.openelm import OpenELM
from ..tensors import read_with_metadata

_FORMAT = "openelm-mlx prompt cache 1"
_SPREAD = 2654435761  # near 2**32 over the golden ratio, so that neighbours get very different factors


class PromptCache:
    """Keys and values of a text; the next text reuses those of their common prefix.

    Args:
        config: how keys and values are stored.

    Attributes:
        tokens: the ids of the text.
        kv: their keys and values.
    """

    def __init__(self, model: OpenELM, config: CacheConfig = CacheConfig()):  # noqa: B008, frozen
        self._model = model
        self._fingerprint: str | None = None
        self.config = config
        self.clear()

    def __repr__(self) -> str:
        return f"PromptCache({len(self.tokens):,} tokens, {self.config.label})"

    def clear(self) -> None:
        """Remove the text, its keys and its values."""
        self.tokens: list[int] = []
        self.kv: KVCache = self._model.make_cache(self.config)

    def reuse(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Trim the text to the prefix shared with `tokens`; returns this prefix and the rest, at least one token."""
        shared = 0
        for kept, token in zip(self.tokens, tokens[:-1], strict=False):
            if kept != token:
                break
            shared += 1
        goes_back = shared < len(self.tokens)
        if goes_back and (not self.kv.can_trim or (self.kv.is_quantized and shared < self.config.quantize_after)):
            self.clear()
            return [], list(tokens)
        self.kv.trim(len(self.tokens) - shared)
        self.tokens = self.tokens[:shared]
        return list(tokens[:shared]), list(tokens[shared:])

    def hold(self, tokens: Sequence[int]) -> None:
        """Set the text of the keys and values; the longer of the two is cut to the length of the shorter."""
        self.tokens = list(tokens[: self.kv.offset])
        surplus = self.kv.offset - len(self.tokens)
        if surplus and not self.kv.can_trim:
            self.clear()
        else:
            self.kv.trim(surplus)

    def save(self, path: str | Path) -> None:
        """Write text, keys and values to a file, which replaces an existing one.

        Raises:
            OutputError: if it cannot be written.
        """
        with output_file(path, overwrite=True) as output:
            write_prompt_cache(self, output)

    def about(self) -> dict[str, str]:
        """The metadata of a file: the model, the configuration and the tokens."""
        return {
            "format": _FORMAT,
            "model": self._fingerprint or model_fingerprint(self._model),
            "config": json.dumps(asdict(self.config)),
            "tokens": json.dumps(self.tokens),
            "quantized": json.dumps(self.kv.is_quantized),
        }

    @classmethod
    def load(cls, model: OpenELM, path: str | Path, config: CacheConfig | None = None) -> "PromptCache":
        """Read a cache from a file.

        Args:
            config: how keys and values must be stored; by default as in the file.

        Raises:
            CacheError: if the file is not a prompt cache, is damaged, or has another model or configuration.
        """
        try:
            stored, about = read_with_metadata(Path(path))
        except WeightsError as error:
            raise CacheError(f"{path} is not a prompt cache: {error}") from error
        if about.get("format") != _FORMAT:
            raise CacheError(f"{path} is not a prompt cache, or was written by another version of this package")
        own = model_fingerprint(model)
        if about.get("model") != own:
            raise CacheError(f"{path} was made with another model, adapter or dtype; delete it or choose another file")
        try:
            settings, tokens, quantized = (
                parse_json(about[name], name, CacheError) for name in ("config", "tokens", "quantized")
            )
            saved = CacheConfig(**settings)
            _check_tokens(tokens, model.config.vocab_size)
        except (KeyError, ValueError, TypeError, RecursionError, CacheError) as error:
            raise CacheError(f"{path} is damaged: {one_line(error)}") from error
        if config is not None and config != saved:
            raise CacheError(f"{path} has another KV cache ({saved.label}, not {config.label}); choose another file")
        cache = cls(model, saved)
        cache._fingerprint = own
        cache.tokens = tokens
        try:
            arrays = {name: tensor.read() for name, tensor in stored.items()}
            cache.kv.from_arrays(arrays, len(tokens), quantized is True)
            _check_arrays(cache.kv, model)
        except (KeyError, IndexError, ValueError, CacheError, WeightsError) as error:
            raise CacheError(f"{path} is damaged: {str(error).partition(':')[0]}") from error
        return cache


def _check_tokens(tokens: Any, vocab_size: int) -> None:
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise CacheError("its tokens are not ids of the vocabulary")


def _check_arrays(cache: KVCache, model: OpenELM) -> None:
    """Make sure that a cache from a file has the arrays that the model would have written, all of them finite."""
    dtype = model.transformer.norm.weight.dtype
    for layer, (heads, found) in enumerate(zip(model.config.num_kv_heads, cache.buffers, strict=True)):
        if not found:
            continue
        one = mx.zeros((1, heads, 1, model.config.head_dim), dtype)
        wanted = cache.layout.to_arrays(cache.layout.allocate(one, one, cache.offset), cache.offset)
        for array, expected in zip(found, wanted, strict=True):
            if (array.shape, array.dtype) != (expected.shape, expected.dtype):
                raise CacheError(f"layer {layer} has an array of another shape or dtype")
            if mx.issubdtype(array.dtype, mx.floating) and not mx.all(mx.isfinite(array)).item():
                raise CacheError(f"layer {layer} contains NaN or infinity")


def write_prompt_cache(cache: PromptCache, output: OutputFile) -> None:
    """Write a cache to a file that has been locked since the cache was read from it."""
    arrays: Any = cache.kv.to_arrays()
    mx.eval(arrays)
    with output.replaced() as file:
        mx.save_safetensors(file, arrays, cache.about())


def model_fingerprint(model: OpenELM) -> str:
    """A SHA-256 hash that changes with the model's configuration, weights, dtype and adapter."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    parameters: Any = tree_flatten(model.parameters())
    for name, array in parameters:
        digest.update(f"{name} {array.shape} {array.dtype} {_sum_of_bits(array).item()}".encode())
    return digest.hexdigest()


def _sum_of_bits(array: mx.array) -> mx.array:
    """The sum of the words, each times an odd factor for its position, modulo 2**32."""
    types = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint32}
    words = array.reshape(-1).view(types[array.dtype.size]).astype(mx.uint32)
    places = mx.arange(words.size, dtype=mx.uint32) * _SPREAD
    return (words * (2 * places + 1)).sum()
