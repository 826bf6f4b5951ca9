"""A model as found on disk: its configuration and its tensors, under the names that this package uses.

Weights in every supported format become a `Source`; the code that loads or writes it does not depend on the format.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import OpenELMConfig
from ..errors import ConfigError, QuantizationError, WeightsError, readable, shorten
from ..model.openelm import parameter_shapes
from ..quantization import PackedTensor, join_packed
from ..tensors import LazyTensor, dtype_name, is_buffer

Tensor = LazyTensor | PackedTensor

_EMBEDDING, _OUTPUT = _VOCABULARY = ("transformer.token_embeddings.weight", "lm_head.weight")
LARGEST_PADDING = 512  # rows; CoreNet pads a vocabulary to a multiple of 128
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of PyTorch
_PREFIXES = ("base_model.model.", "model.")  # of PEFT, and of classes that hold the network
_ROOTS = ("transformer.", "lm_head.", "classifier.", "token_embeddings.", "layers.", "norm.")


@dataclass(frozen=True)
class Source:
    """A model whose tensors are still on disk.

    Raises:
        WeightsError: if tensors are missing, unexpected, or not of the shape or type that the configuration requires.
    """

    config: OpenELMConfig
    tensors: dict[str, Tensor]
    name: str  # for messages and the model card
    folder: Path | None = None  # may contain a tokenizer
    named_vocab_size: int | None = None  # rows that are tokens, if more rows may follow as padding
    names_eos: bool = False  # whether the configuration says which ids end a text; else the tokenizer alone does
    chat_template: str | None = None  # of a model that was tuned on conversations
    sampling: Mapping[str, Any] = field(default_factory=dict)  # what `generation_config.json` says of it
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
    """A source from tensors as stored in a file.

    The parts of each quantized matrix are joined. Buffers are left out, and a copy of a tied embedding is too.

    Args:
        quantization: the `quantization` entry of a `config.json`.
        has_padding: whether the vocabulary may have more rows than the configuration says, as in CoreNet.
        about: the other fields of `Source`.
    Raises:
        WeightsError, ConfigError, QuantizationError: if the tensors, configuration and quantization do not match.
    """
    embedding = tensors.get(_EMBEDDING)
    if has_padding and embedding is not None and embedding.num_rows > config.vocab_size:
        about["named_vocab_size"] = config.vocab_size
        config = replace(config, vocab_size=embedding.num_rows)
    weights = {name: tensor for name, tensor in tensors.items() if not is_buffer(name, tensor.dtype)}
    try:
        _check_depth(weights, config.num_transformer_layers)
        found = join_packed(weights, parameter_shapes(config), quantization)
        if config.share_input_output_layers and _OUTPUT in found and _EMBEDDING in found:
            _check_copy(found.pop(_OUTPUT), found[_EMBEDDING])
        return Source(config, found, **about)
    except (ConfigError, QuantizationError, WeightsError) as error:
        raise type(error)(f"{readable(about['name'])}: {error}") from error


def plain_name(name: str) -> str:
    """A tensor's name without what PyTorch's wrappers, PEFT and other classes put in front of it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    plain = name
    while plain.startswith(_PREFIXES):
        plain = plain.removeprefix(next(prefix for prefix in _PREFIXES if plain.startswith(prefix)))
    return plain if plain.startswith(_ROOTS) else name


def plain_names(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors under their names in the Hugging Face checkpoints; `transformer.` is added where it was left out.

    Raises:
        WeightsError: if two tensors get the same name.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        plain = plain_name(name)
        plain = f"transformer.{plain}" if plain.startswith(("token_embeddings.", "layers.", "norm.")) else plain
        if plain in found:
            raise WeightsError(f"there are two tensors for {readable(plain)}; one is called {readable(name)}")
        found[plain] = tensor
    return found


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that `found` has exactly the expected tensors, in the expected shapes, of floating-point numbers.

    Raises:
        WeightsError: naming the tensors that are missing or unexpected, or one of a wrong shape or type.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        parts = [
            f"{kind}: {shorten(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise WeightsError(f"weights do not match the configuration; {'; '.join(parts)}")
    for name, shape in expected.items():
        tensor = found[name]
        if isinstance(tensor, LazyTensor) and not mx.issubdtype(tensor.dtype, mx.floating):
            raise WeightsError(f"{name} has type {dtype_name(tensor.dtype)}; weights must be floating-point numbers")
        if tensor.shape != shape:
            raise WeightsError(f"{name} has shape {tensor.shape}; the configuration requires {shape}")


def _check_depth(found: Mapping[str, LazyTensor], num_layers: int) -> None:
    """Make sure that each layer has tensors, before the shapes of all parameters are computed.

    Raises:
        WeightsError: naming the layers that have none.
    """
    layers = {parts[2] for parts in (name.split(".") for name in found) if parts[:2] == ["transformer", "layers"]}
    if len(layers) < num_layers:
        first = next(layer for layer in range(num_layers) if str(layer) not in layers)
        raise WeightsError(
            f"weights do not match the configuration; missing: transformer.layers.{first} (num_transformer_layers is "
            f"{num_layers:,}, and the weights have {len(layers):,} layers)"
        )


def _check_copy(output: Tensor, embedding: Tensor) -> None:
    """Make sure that the output matrix of a model with tied embeddings has the values of the embedding.

    Raises:
        WeightsError: if it has others, so that it is unclear which are meant.
    """
    one, other = (tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor for tensor in (output, embedding))
    if one.shape != other.shape or not all(
        mx.array_equal(one.read_rows(*rows).astype(mx.float32), other.read_rows(*rows).astype(mx.float32)).item()
        for rows in one.blocks()
    ):
        raise WeightsError(
            f"{_OUTPUT} differs from {_EMBEDDING}, but share_input_output_layers is true in the configuration; set it "
            "to false to use both, or remove one"
        )


def _first_rows(tensor: Tensor, rows: int) -> Tensor:
    if isinstance(tensor, PackedTensor):
        return replace(tensor, parts={name: part.first_rows(rows) for name, part in tensor.parts.items()})
    return tensor.first_rows(rows)
