"""A model as found on disk: its configuration and its tensors, under the names that this package uses.

Weights in every supported format become a `Source`; the code that loads or writes it does not depend on the format.
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
LARGEST_PADDING = 512  # rows; CoreNet pads a vocabulary to a multiple of 128


@dataclass(frozen=True)
class Source:
    """A model whose tensors are still on disk.

    Raises:
        WeightsError: if tensors are missing, unexpected or not of the shape that the configuration requires.
    """

    config: OpenELMConfig
    tensors: dict[str, Tensor]
    name: str  # for messages and the model card
    folder: Path | None = None  # may contain a tokenizer
    named_vocab_size: int | None = None  # rows that are tokens, if more rows may follow as padding
    chat_template: str | None = None  # of a model that was tuned on conversations
    is_converted: bool = False  # written by this package: a missing tokenizer was left out on purpose

    def __post_init__(self) -> None:
        check_tensors(self.tensors, parameter_shapes(self.config))

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_vocabulary(self, vocab_size: int) -> "Source":
        """The model without the padding rows of its vocabulary, which follow the first `vocab_size` rows.

        Raises:
            ConfigError: if there are fewer rows than that, or too many more to be padding.
        """
        rows = self.config.vocab_size
        if not 0 <= rows - vocab_size < LARGEST_PADDING:
            raise ConfigError(
                f"the vocabulary of {self.name} has {rows:,} entries, but the tokenizer has {vocab_size:,}"
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
    """A source from tensors as stored in a file; the parts of each quantized matrix are joined.

    Args:
        quantization: the `quantization` entry of a `config.json`.
        has_padding: whether the vocabulary may have more rows than the configuration says, as in CoreNet.
        about: the other fields of `Source`.
    Raises:
        WeightsError, ConfigError, QuantizationError: if the tensors, configuration and quantization do not match.
    """
    embedding = tensors.get(_VOCABULARY[0])
    if has_padding and embedding is not None and embedding.shape[0] > config.vocab_size:
        about["named_vocab_size"] = config.vocab_size
        config = replace(config, vocab_size=embedding.shape[0])
    return Source(config, join_packed(tensors, parameter_shapes(config), quantization), **about)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that `found` has exactly the expected tensors, in the expected shapes.

    Raises:
        WeightsError: naming the tensors that are missing or unexpected, or one of the wrong shape, with both shapes.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        parts = [
            f"{kind}: {shorten(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise WeightsError(f"weights do not match the configuration; {'; '.join(parts)}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise WeightsError(f"{name} has shape {found[name].shape}; the configuration requires {shape}")


def _first_rows(tensor: Tensor, rows: int) -> Tensor:
    if isinstance(tensor, PackedTensor):
        return replace(tensor, parts={name: part.first_rows(rows) for name, part in tensor.parts.items()})
    return tensor.first_rows(rows)
