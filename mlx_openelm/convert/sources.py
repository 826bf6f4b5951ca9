"""The forms that OpenELM weights come in, told apart by what lies there."""

from collections.abc import Sequence
from pathlib import Path

from ..config import OpenELMConfig
from ..errors import SourceError
from ..hub import model_folder
from .corenet import read_apple_mlx, read_checkpoints
from .huggingface import read_huggingface
from .source import Source

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def open_source(
    sources: Sequence[str | Path], *, config: str | Path | None = None, revision: str | None = None
) -> Source:
    """A model in any form, ready to be read.

    Raises:
        OpenELMError: of the kind that fits, if it is not there, damaged or contradicts its configuration.
    """
    if not sources:
        raise SourceError("no source was given")
    named = read_config(config) if config is not None else None
    paths = [Path(source).expanduser() for source in sources]
    if any(path.suffix in TORCH_SUFFIXES and not path.is_dir() for path in paths):
        for path in paths:
            if not path.is_file():
                raise SourceError(f"{path} does not exist" if not path.exists() else f"{path} is not a .pt file")
        return read_checkpoints(paths, named)
    if len(sources) > 1:
        raise SourceError("several sources are averaged if they are .pt files; give one folder or hub id otherwise")

    folder = model_folder(sources[0], revision)
    if (folder / "weights.safetensors").exists() and not (folder / "model.safetensors").exists():
        return read_apple_mlx(folder, named)
    return read_huggingface(folder, named)


def read_config(name: str | Path) -> OpenELMConfig:
    """The configuration that `--config` names: a preset, a YAML file or a `config.json`, or a folder with one.

    Raises:
        ConfigError: if it is none of them.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return OpenELMConfig.from_file(path / "config.json")
    if path.exists() or path.suffix in (".json", ".yaml", ".yml"):
        return OpenELMConfig.from_file(path)
    return OpenELMConfig.preset(str(name))
