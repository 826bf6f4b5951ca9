"""Every error a user can meet: what is wrong, the value, and what to do about it.

The command line prints the message as one line and exits with status 2; a program catches `OpenELMError`.
"""

import os
from collections.abc import Iterable
from pathlib import Path


class OpenELMError(Exception):
    """A mistake in what was asked for or handed in, as opposed to a fault of this package."""


class ConfigError(OpenELMError):
    """A configuration that cannot be read, that contradicts itself, or that asks for what OpenELM is not."""


class SourceError(OpenELMError):
    """A model that is not where it was looked for, or not in a form that can be read."""


class WeightsError(OpenELMError):
    """A file of weights that is damaged, or weights that do not belong to the configuration."""


class TorchFileError(WeightsError):
    """A PyTorch file that is damaged, or whose pickle asks for more than plain tensors."""


class QuantizationError(OpenELMError):
    """Bits, a group size or a mode that MLX does not offer."""


class TokenizerError(OpenELMError):
    """A tokenizer that cannot be found or read, or text that it cannot take."""


class SamplingError(OpenELMError):
    """A sampling setting outside its range."""


class PromptError(OpenELMError):
    """A prompt that no text can follow: empty, or not text."""


class DataError(OpenELMError):
    """Text to train on that is missing, broken, or not enough."""


class TrainingError(OpenELMError):
    """A run that cannot start, go on, or be resumed."""


class CacheError(OpenELMError):
    """Keys and values that cannot be kept as asked for, or a file of them that does not fit."""


class BenchError(OpenELMError):
    """A benchmark that cannot be run as asked for."""


class AdapterError(OpenELMError):
    """An adapter that cannot be read, or that does not belong to its model."""


class MissingPackageError(OpenELMError):
    """A feature whose package is not installed."""


class OutputError(OpenELMError):
    """Results that cannot be written where they were asked for."""


class OutputExistsError(OutputError):
    """Something already stands where the result should go."""

    def __init__(self, path: Path):
        super().__init__(f"{path} already exists; use `force` to replace it, or choose another `output`")


class OutputLockedError(OutputError):
    """Another process is writing to the same place."""

    def __init__(self, path: Path, process: int | None):
        who = f"process {process}" if process else "another process"
        remedy = "wait until it has finished, or choose another `output`"
        if process == os.getpid():
            who, remedy = "this process", "finish that first, or choose another `output`"
        super().__init__(f"{who} is writing {path}; {remedy}")


class DiskSpaceError(OutputError):
    """The disk cannot hold the result."""

    def __init__(self, path: Path, needed_bytes: int, free_bytes: int):
        super().__init__(
            f"{path} needs {needed_bytes / 2**20:,.0f} MiB and the disk has {free_bytes / 2**20:,.0f} MiB free; "
            "free some space, or choose an `output` on another disk"
        )


class MemoryLimitError(OpenELMError):
    """A prompt whose keys, values and activations do not fit into this machine's memory."""

    def __init__(self, num_tokens: int, needed_bytes: int, limit_bytes: int):
        super().__init__(
            f"a prompt of {num_tokens:,} tokens needs about {needed_bytes / 2**30:,.1f} GiB and this machine has "
            f"{limit_bytes / 2**30:,.1f} GiB; shorten the prompt"
        )


def shorten(names: Iterable[str], limit: int = 4) -> str:
    """Names for a message: the first `limit` of them, then how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
