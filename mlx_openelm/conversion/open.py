"""The forms that OpenELM weights come in, told apart by what lies there."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, SourceError
from ..hub import model_folder
from ..model.adapters import SavedAdapter
from .adapters.corenet import read_fine_tuned
from .average import average
from .read.config import read_config
from .read.corenet import checkpoint_tensors, holds_adapter, read_apple_mlx, read_checkpoint
from .read.huggingface import read_huggingface
from .source import Source

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def open_source(
    sources: Sequence[str | Path], *, config: str | Path | None = None, revision: str | None = None
) -> Source:
    """A model in any form, ready to be read; of several, their average.

    Raises:
        OpenELMError: of the kind that fits, if it is not there, damaged or contradicts its configuration.
    """
    if not sources:
        raise SourceError("no source was given")
    named = read_config(config) if config is not None else None
    path = Path(sources[0]).expanduser()
    if len(sources) > 1:
        return average([open_source([source], config=config, revision=revision) for source in sources])

    if path.suffix in TORCH_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise SourceError(f"{path} does not exist" if not path.exists() else f"{path} is not a .pt file")
        return read_checkpoint(path, named)
    folder = model_folder(sources[0], revision)
    if (folder / "weights.safetensors").exists() and not (folder / "model.safetensors").exists():
        return read_apple_mlx(folder, named)
    return read_huggingface(folder, named)


def open_with_adapter(
    sources: Sequence[str | Path],
    *,
    config: str | Path | None = None,
    revision: str | None = None,
    alpha: float | None = None,
) -> tuple[Source, SavedAdapter | None]:
    """A model in any form, and of a CoreNet fine-tuning checkpoint the adapter beside it.

    Args:
        alpha: of that adapter.
    Raises:
        OpenELMError: as for `open_source`.
    """
    path = Path(sources[0]).expanduser() if len(sources) == 1 else Path()
    if path.suffix in TORCH_SUFFIXES and path.is_file() and holds_adapter(checkpoint_tensors(path)):
        return read_fine_tuned(path, config, alpha)
    if alpha is not None:
        raise ConfigError("--alpha belongs to a fine-tuning checkpoint of CoreNet, and no adapter is in this source")
    return open_source(sources, config=config, revision=revision), None
