"""Where a model comes from, for model cards: its base model on the hub, and its licence."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import PRESETS, OpenELMConfig
from ..errors import OpenELMError, SourceError
from ..files.paths import check_links, exists, is_file, is_folder, read_text, user_path
from ..files.yaml_file import parse_yaml
from ..hub import cached_file, model_folder

CARD = "README.md"
UNKNOWN_LICENSE = "unknown"
_APPLE_LICENSE = "apple-amlr"  # of Apple's OpenELM repositories
_LARGEST_CARD = 1 << 20  # bytes
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEXT = re.compile(r"[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]{0,199}")  # a licence: one short line


@dataclass(frozen=True)
class Origin:
    """The base model of a card and the licence of its weights.

    Attributes:
        base_model: id on the hub, if it is known.
        license: the hub's identifier of the licence, `other`, or `unknown`.
        license_name, license_link: further entries of the hub's metadata, if the source has them.
    """

    base_model: str | None = None
    license: str = UNKNOWN_LICENSE
    license_name: str | None = None
    license_link: str | None = None


def origin_of(folder: Path | None, config: OpenELMConfig) -> Origin:
    """The origin of the model in a folder; everything in it is optional, and what cannot be read is unknown.

    The base model is the folder's repository if the folder is in the hub's cache, otherwise the one in its card,
    otherwise the model of Apple whose name and widths the folder has. The licence is that of the card. Without one, it
    is Apple's for a model of Apple.
    """
    if folder is None:
        return Origin()
    found = origin_from_card(folder)
    base = _repository(folder) or found.base_model or _of_apple(folder, config)
    if found.license == UNKNOWN_LICENSE and base is not None and base.startswith("apple/OpenELM"):
        return Origin(base, _APPLE_LICENSE)
    link = found.license_link
    if link is not None and "/" not in link:  # a file of the repository, which is not copied
        link = f"https://huggingface.co/{base}/blob/main/{link}" if base is not None else None
    return replace(found, base_model=base, license_link=link)


def origin_of_model(name: str | Path, config: OpenELMConfig) -> Origin:
    """The origin of a model that was loaded by this path, hub id or name, without asking the hub again."""
    path = user_path(name)
    if is_file(path):
        return origin_of(path.parent, config)
    if is_folder(path) or not _REPO_ID.fullmatch(str(name)):
        return origin_of(model_folder(name), config)
    card = cached_file(str(name), CARD)
    return origin_of(card.parent, config) if card is not None else Origin(str(name))


def origin_from_card(folder: Path) -> Origin:
    """The origin in the metadata of a folder's card, if there is a card that can be read."""
    try:
        if not exists(folder / CARD):
            return Origin()
        check_links(folder, [CARD])
        front = _FRONT_MATTER.match(read_text(folder / CARD, SourceError, _LARGEST_CARD))
        values = parse_yaml(front[1], CARD, SourceError) if front else None
    except OpenELMError:  # a card is for people: a damaged one stops nothing
        return Origin()
    if not isinstance(values, dict):
        return Origin()
    found = Origin(_matching(_REPO_ID, values.get("base_model")))
    terms = {name: _matching(_TEXT, values.get(name)) for name in ("license", "license_name", "license_link")}
    return replace(found, **terms) if terms["license"] is not None else found  # type: ignore[arg-type]


def _matching(pattern: re.Pattern[str], value: object) -> str | None:
    """A value of a card, or the only one of a list, if it is text of the expected form."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def _repository(folder: Path) -> str | None:
    """The hub id of a snapshot in the hub's cache."""
    path = folder.resolve()
    if path.parent.name != "snapshots" or not path.parent.parent.name.startswith("models--"):
        return None
    return _matching(_REPO_ID, path.parent.parent.name.removeprefix("models--").replace("--", "/", 1))


def _of_apple(folder: Path, config: OpenELMConfig) -> str | None:
    """The model of Apple that a folder's name and widths say it is."""
    name = folder.resolve().name
    for size, preset in PRESETS.items():
        named = f"OpenELM-{size.replace('.', '_')}"
        same = all(
            getattr(config, field) == getattr(preset, field)
            for field in ("num_transformer_layers", "model_dim", "head_dim", "num_query_heads", "ffn_dims")
        )
        if same and name in (named, f"{named}-Instruct"):
            return f"apple/{name}"
    return None
