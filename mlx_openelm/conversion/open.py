"""Opening OpenELM weights in any supported format, which is detected from the files."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError, SourceError
from ..files.paths import exists, is_file, is_folder, user_path
from ..hub import model_folder
from ..model.adapters import SavedAdapter
from ..tokenizer.chat_template import named_template
from ..tokenizer.files import find_tokenizer, has_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .average import averaged_source
from .read.config import read_config
from .read.huggingface import read_huggingface
from .source import Source

_log = logging.getLogger(__name__)

# The readers of CoreNet's files are imported when they are needed: `generate` seldom needs them.

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def open_source(
    sources: Sequence[str | Path], *, config: str | Path | None = None, revision: str | None = None
) -> Source:
    """Open a model in any supported format without reading its tensors; several sources are averaged.

    Raises:
        OpenELMError: a subclass, if a source is missing, damaged or does not match its configuration.
    """
    if not sources:
        raise SourceError("no source was given")
    named = read_config(config) if config is not None else None
    path = user_path(sources[0])
    if len(sources) > 1:
        return averaged_source([open_source([source], config=config, revision=revision) for source in sources])

    if path.suffix in TORCH_SUFFIXES and not is_folder(path):
        if not is_file(path):
            raise SourceError(f"{path} does not exist" if not exists(path) else f"{path} is not a .pt file")
        from .read.corenet import read_checkpoint

        return read_checkpoint(path, named)
    folder = model_folder(sources[0], revision)
    _log.debug("%s is the folder %s", sources[0], folder)
    if exists(folder / "weights.safetensors") and not exists(folder / "model.safetensors"):
        from .read.corenet import read_apple_mlx

        return read_apple_mlx(folder, named)
    return read_huggingface(folder, named)


class OpenedModel(NamedTuple):
    """A model whose tensors are still on disk, with its tokenizer and adapter."""

    source: Source
    tokenizer: Tokenizer | None
    tokenizer_origin: str | None  # a description of its origin
    adapter: SavedAdapter | None  # from a CoreNet fine-tuning checkpoint


def open_model(
    sources: Sequence[str | Path],
    *,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    revision: str | None = None,
    alpha: float | None = None,
    keep_padding: bool = False,
    take_adapter: bool = False,
    chat_template: str | Path | None = None,
) -> OpenedModel:
    """Open a model in any supported format, and its tokenizer; several sources are averaged.

    Args:
        tokenizer: file, folder or hub id; `"none"` skips the tokenizer.
        config: the configuration, if the source lacks one: a preset, a CoreNet YAML file or a `config.json`.
        revision: branch, tag or commit on the hub, for the model and for a `tokenizer` that is a hub id.
        alpha: alpha of the adapter in a fine-tuning checkpoint.
        keep_padding: keep the padding rows of CoreNet's vocabulary.
        chat_template: `openelm` or a file, in place of the model's own.
        take_adapter: also accept fine-tuning checkpoints, which hold a model and an adapter.
    Raises:
        OpenELMError: a subclass, if something is missing, damaged or contradictory.
    """
    if take_adapter:
        source, adapter = _open_with_adapter(sources, config, revision, alpha)
    else:
        source, adapter = open_source(sources, config=config, revision=revision), None
    if chat_template is not None:
        source = replace(source, chat_template=named_template(chat_template))
    text, origin = _tokenizer_of(source, tokenizer, revision)
    if text is not None and text.eos_token_id not in source.config.eos_token_ids:
        source = replace(source, config=source.config.with_eos(text.eos_token_id, only=not source.names_eos))
    if source.named_vocab_size and not keep_padding:
        source = source.with_vocabulary(text.vocab_size if text else source.named_vocab_size)
    if adapter is not None:
        from .adapters.common import with_vocabulary

        adapter = with_vocabulary(adapter, source.config.vocab_size)
    return OpenedModel(source, text, origin, adapter)


def _open_with_adapter(
    sources: Sequence[str | Path], config: str | Path | None, revision: str | None, alpha: float | None
) -> tuple[Source, SavedAdapter | None]:
    """A model and, from a CoreNet fine-tuning checkpoint, its adapter."""
    path = user_path(sources[0]) if len(sources) == 1 else Path()
    if path.suffix in TORCH_SUFFIXES and is_file(path):
        from .adapters.corenet import read_fine_tuned
        from .read.corenet import checkpoint_tensors, holds_adapter

        if holds_adapter(checkpoint_tensors(path)):
            return read_fine_tuned(path, config, alpha)
    if alpha is not None:
        raise ConfigError("`alpha` is for a CoreNet fine-tuning checkpoint; this source has no adapter")
    return open_source(sources, config=config, revision=revision), None


def _tokenizer_of(
    source: Source, requested: str | Path | None, revision: str | None
) -> tuple[Tokenizer | None, str | None]:
    if requested == "none" or (requested is None and source.is_converted and not has_tokenizer(source.folder)):
        return None, None
    return find_tokenizer(
        None if requested is None else str(requested),
        source.folder,
        source.config.vocab_size,
        chat_template=source.chat_template,
        revision=revision if requested is not None else None,
    )
