"""A model as it was found: its configuration and its tensors, under the names that this package uses.

Every form of OpenELM weights becomes a `Source`; what is loaded or written afterwards knows nothing of where it came
from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import OpenELMConfig
from ..errors import ConfigError, WeightsError, shorten
from ..model.openelm import parameter_shapes
from ..quantization import PackedTensor, join_packed
from ..tensors import LazyTensor

Tensor = LazyTensor | PackedTensor

_VOCABULARY = ("transformer.token_embeddings.weight", "lm_head.weight")
LARGEST_PADDING = 512  # rows; CoreNet fills a vocabulary up to a multiple of 128


@dataclass(frozen=True)
class Source:
    """A model whose tensors are still on disk.

    Raises:
        WeightsError: if tensors are missing, unexpected or of another shape than the configuration asks for.
    """

    config: OpenELMConfig
    tensors: dict[str, Tensor]
    name: str  # what to call it in messages and in the model card
    folder: Path | None = None  # where a tokenizer may lie
    named_vocab_size: int | None = None  # rows that stand for tokens, where more may follow as padding
    is_chat: bool = False
    is_converted: bool = False  # written by this package: a tokenizer that is not there was left out on purpose

    def __post_init__(self) -> None:
        check_tensors(self.tensors, parameter_shapes(self.config))

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_vocabulary(self, vocab_size: int) -> "Source":
        """The model without the rows that fill its vocabulary up behind `vocab_size`.

        Raises:
            ConfigError: if so many rows would go that they cannot be padding.
        """
        rows = self.config.vocab_size
        if not 0 <= rows - vocab_size < LARGEST_PADDING:
            raise ConfigError(
                f"{self.name} has a vocabulary of {rows:,} entries and the tokenizer one of {vocab_size:,}"
            )
        tensors = dict(self.tensors)
        for name in _VOCABULARY:
            if name in tensors:
                tensors[name] = _first_rows(tensors[name], vocab_size)
        return replace(self, config=replace(self.config, vocab_size=vocab_size), tensors=tensors, named_vocab_size=None)


def make_source(
    config: OpenELMConfig,
    tensors: Mapping[str, LazyTensor],
    quantization: Mapping[str, Any] | None = None,
    has_padding: bool = False,
    **about: Any,
) -> Source:
    """A source of tensors as they stand in a file; packed matrices are put together.

    Args:
        quantization: the entry of that name in a `config.json`.
        has_padding: whether the vocabulary may have more rows than the configuration says, as CoreNet's have.
        about: the descriptive fields of `Source`.
    Raises:
        WeightsError, ConfigError, QuantizationError: if the parts do not belong together.
    """
    embedding = tensors.get(_VOCABULARY[0])
    if has_padding and embedding is not None and embedding.shape[0] > config.vocab_size:
        about["named_vocab_size"] = config.vocab_size
        config = replace(config, vocab_size=embedding.shape[0])
    return Source(config, join_packed(tensors, parameter_shapes(config), quantization), **about)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that exactly the expected tensors are there, in the expected shapes.

    Raises:
        WeightsError: naming what is missing, unexpected, or of another shape, with both shapes.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        parts = [f"{kind} {shorten(names)}" for kind, names in (("miss", missing), ("also hold", unexpected)) if names]
        raise WeightsError(f"weights and configuration do not belong together: the weights {' and '.join(parts)}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise WeightsError(f"{name} has the shape {found[name].shape}; its configuration asks for {shape}")


def _first_rows(tensor: Tensor, rows: int) -> Tensor:
    if isinstance(tensor, PackedTensor):
        return replace(tensor, parts={name: part.first_rows(rows) for name, part in tensor.parts.items()})
    return tensor.first_rows(rows)
