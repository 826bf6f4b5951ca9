"""All errors that a user can see. A message says what is wrong, the value, and what to do about it.

The command line prints the message as one line and exits with status 2; programs can catch `OpenELMError`.
"""

import os
import reprlib
from collections.abc import Iterable
from pathlib import Path


class OpenELMError(Exception):
    """Base class: a mistake in the arguments, files or environment, as opposed to a bug in this package."""


class ConfigError(OpenELMError):
    """A configuration that cannot be read, contradicts itself, or is not an OpenELM; or an invalid argument."""


class PathError(OpenELMError):
    """A path that the system refuses, or a link that leads out of a model folder."""


class SourceError(OpenELMError):
    """A model that does not exist, cannot be downloaded, or is in an unsupported format."""


class HubUnreachableError(SourceError):
    """The Hugging Face hub does not answer, so no other repository on it needs to be tried."""


class WeightsError(OpenELMError):
    """A damaged weights file, or weights that do not match the configuration."""


class TorchFileError(WeightsError):
    """A PyTorch file that is damaged, or whose pickle needs more than plain tensors."""


class QuantizationError(OpenELMError):
    """Bits, a group size or a mode that MLX does not offer."""


class TokenizerError(OpenELMError):
    """A tokenizer that cannot be found or read, or text that it cannot encode."""


class SamplingError(OpenELMError):
    """A sampling setting out of range."""


class PromptError(OpenELMError):
    """A prompt that cannot be continued: empty, or not text."""


class DataError(OpenELMError):
    """Training data that is missing, malformed or too small."""


class TaskError(OpenELMError):
    """A task of an evaluation that does not exist, or whose file is not valid."""


class TrainingError(OpenELMError):
    """A run that cannot start, continue or be resumed."""


class CacheError(OpenELMError):
    """An unsupported cache configuration, or a saved cache that does not fit."""


class BenchError(OpenELMError):
    """A benchmark that cannot run as requested."""


class EvaluationError(OpenELMError):
    """A task, metric or run of an evaluation that is unknown, damaged, or does not match another one."""


class AdapterError(OpenELMError):
    """An adapter that cannot be read or converted, or does not fit its model."""


class MissingPackageError(OpenELMError):
    """A feature whose package is not installed."""


class OutputError(OpenELMError):
    """An output that cannot be written."""


class OutputExistsError(OutputError):
    """The output already exists."""

    def __init__(self, path: Path):
        super().__init__(f"{path} already exists; use `force` to replace it, or choose another `output`")


class OutputLockedError(OutputError):
    """Another process is writing the same output."""

    def __init__(self, path: Path, process: int | None):
        who = f"process {process}" if process else "another process"
        remedy = "wait until it has finished, or choose another `output`"
        if process == os.getpid():
            who, remedy = "this process", "finish that first, or choose another `output`"
        super().__init__(f"{who} is writing {path}; {remedy}")


class DiskSpaceError(OutputError):
    """The disk does not have enough free space for the output."""

    def __init__(self, path: Path, needed_bytes: int, free_bytes: int):
        super().__init__(
            f"{path} needs {needed_bytes / 2**20:,.0f} MiB, but the disk has only {free_bytes / 2**20:,.0f} MiB free; "
            "free some space, or choose an `output` on another disk"
        )


class MemoryLimitError(OpenELMError):
    """A prompt whose KV cache and activations do not fit into this machine's memory."""

    def __init__(self, num_tokens: int, needed_bytes: int, limit_bytes: int):
        super().__init__(
            f"a prompt of {num_tokens:,} tokens needs about {needed_bytes / 2**30:,.1f} GiB, but this machine has "
            f"{limit_bytes / 2**30:,.1f} GiB; shorten the prompt"
        )


def shorten(names: Iterable[str], limit: int = 4) -> str:
    """Names joined for a message: the first `limit`, then the number of others."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(readable, names[:limit])) + more


def readable(name: str) -> str:
    """A name from a file for a message: as it is, unless it is very long or contains control characters."""
    return name if len(name) <= _LONGEST_NAME and name.isprintable() else quoted(name)


def one_line(reason: object, limit: int = 200) -> str:
    """The text of another library's error for a message: white space joined and cut short; its type if it has none."""
    return " ".join(str(reason).split())[:limit] or type(reason).__name__


def quoted(value: object) -> str:
    """A value from a file for a message: its `repr`, cut short whatever its size and depth."""
    return _SHORT.repr(value)


_LONGEST_NAME = 120
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
