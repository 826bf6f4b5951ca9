"""The files of a tokenizer, as they are read here: settings, added tokens, the content of `tokenizer.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TokenizerError, quoted
from ..files.json_file import read_json_object
from ..files.paths import exists, read_text

SETTINGS_FILE = "tokenizer_config.json"
_OTHER_SETTINGS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
JSON_FILE = "tokenizer.json"
LARGEST_VOCABULARY = 1 << 24
_LONGEST_AFFIX = 64  # characters; each word of a text gets it
LARGEST_FILE = 1 << 28  # bytes; the largest known one has 34 million


def settings_beside(path: Path) -> dict[str, Any]:
    """The settings of a tokenizer: `tokenizer_config.json`, and what `special_tokens_map.json` alone says.

    Raises:
        TokenizerError: if a file is damaged.
    """
    return {
        **_read(path.with_name(_OTHER_SETTINGS_FILE)),
        **_read(path.with_name(SETTINGS_FILE)),
    }


def added_tokens_beside(path: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The added tokens that the settings beside a `tokenizer.model` list, by id.

    Raises:
        TokenizerError: if a file is damaged.
    """
    found: dict[int, dict[str, Any]] = {}
    control = _control_names(settings)
    for content, token in _read(path.with_name(ADDED_TOKENS_FILE)).items():
        found[_id(token, path.with_name(ADDED_TOKENS_FILE))] = added_token(content, special=content in control)
    other = path.with_name(JSON_FILE)
    if "added_tokens_decoder" not in settings and exists(other):
        entries = tokenizer_values(read_text(other, TokenizerError, LARGEST_FILE), other).get("added_tokens") or ()
        return {**found, **{entry["id"]: entry for entry in entries}}
    decoder = settings.get("added_tokens_decoder") or {}
    place = path.with_name(SETTINGS_FILE)
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{place}: added_tokens_decoder must be an object; got {quoted(decoder)}")
    for token, entry in decoder.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise TokenizerError(f"{place}: added_tokens_decoder[{quoted(token)}] must be an object with a content")
        known = added_token(entry["content"], special=entry.get("special") is True)
        flags = {name: entry[name] for name in known if isinstance(entry.get(name), bool)}
        found[_id(token, place)] = {**known, **flags}
    return found


def _control_names(settings: Mapping[str, Any]) -> set[str]:
    """Names of the control tokens in the settings: BOS and its like, and lists of more."""
    entries = [value for name, value in settings.items() if name.endswith("_token")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name)
        entries += more if isinstance(more, list) else more.values() if isinstance(more, dict) else ()
    return {name for name in map(token_name, entries) if name is not None}


def token_name(entry: Any) -> str | None:
    """The name of a token in the settings: a text, or an object with a content."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def unknown_name(added_tokens: Mapping[int, Mapping[str, Any]]) -> str | None:
    """The usual name of the token for unknown text, if the tokenizer has one of that name."""
    return "<unk>" if any(entry["content"] == "<unk>" for entry in added_tokens.values()) else None


def added_token(content: str, *, special: bool) -> dict[str, Any]:
    """An added token in the form that both `tokenizer.json` and `tokenizer_config.json` use."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **flags, "special": special}


def _id(token: Any, path: Path) -> int:
    if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 10:
        token = int(token)
    if type(token) is not int or not 0 <= token < LARGEST_VOCABULARY:
        raise TokenizerError(f"{path}: {quoted(token)} is not the id of a token")
    return token


def tokenizer_values(content: str, path: Path) -> dict[str, Any]:
    """The values of a `tokenizer.json`, as far as they are used here."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not a tokenizer.json: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise TokenizerError(f"{path} is not a tokenizer.json: it must be an object with a model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(values["model"].get(name) or "")) > _LONGEST_AFFIX:
            raise TokenizerError(f"{path}: {name} is longer than {_LONGEST_AFFIX} characters")
    return _check_added(values, path)


def _check_added(values: dict[str, Any], path: Path) -> dict[str, Any]:
    added = values.get("added_tokens") or []
    if not isinstance(added, list):
        raise TokenizerError(f"{path}: added_tokens must be a list; got {quoted(added)}")
    for entry in added:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("content"), str):
            raise TokenizerError(f"{path}: an added token must have an id and a content; got {quoted(entry)}")
        if type(entry.setdefault("special", False)) is not bool:
            raise TokenizerError(f"{path}: special must be true or false; got {quoted(entry['special'])}")
    return values


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, TokenizerError, optional=True)
