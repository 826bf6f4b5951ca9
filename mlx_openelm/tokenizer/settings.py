"""The small JSON files beside a tokenizer."""

import json
from pathlib import Path
from typing import Any

from ..errors import TokenizerError


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file.

    Raises:
        TokenizerError: if the file cannot be read or contains something else.
    """
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} must contain a JSON object")
    return values
