"""Chat templates: CoreNet's, which is built in, and any other, which Jinja renders in its sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError, one_line, quoted
from ..files.json_file import read_json_object
from ..files.paths import exists, read_text, user_path
from .sandbox import new_sandbox, render
from .settings import SETTINGS_FILE

if TYPE_CHECKING:
    from jinja2 import Template

OPENELM = "openelm"  # the name of CoreNet's template, on the command line too
OPENELM_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CHAT_ROLES = ("system", "user", "assistant")
TEMPLATE_FILE = "chat_template.jinja"
_OTHER_FILE = "chat_template.json"  # where processors of several media keep it
_LARGEST_FILE = 1 << 17  # bytes; the largest known one has 30,000

Messages = Sequence[Mapping[str, Any]]


def read_chat_template(folder: Path) -> str | None:
    """The chat template in a model folder, or `None`.

    It is in `chat_template.jinja`, which comes first, or in `tokenizer_config.json`, as a text or as a list of named
    texts, of which `default` is taken.

    Raises:
        TokenizerError: if a file is damaged.
    """
    path = folder / TEMPLATE_FILE
    if exists(path):
        return read_text(path, TokenizerError, _LARGEST_FILE)
    for name in (SETTINGS_FILE, _OTHER_FILE):
        found = read_json_object(folder / name, TokenizerError, optional=True).get("chat_template")
        if found is not None:
            return _default_of(found, folder / name)
    return None


def named_template(name: str | Path) -> str:
    """The template that `name` refers to: `openelm`, or a file with a Jinja template.

    Raises:
        TokenizerError: if it is neither, or its template is not valid.
    """
    if str(name) == OPENELM:
        return OPENELM_TEMPLATE
    path = user_path(name)
    if not exists(path):
        raise TokenizerError(f"{name} is no chat template: expected {OPENELM}, or a file with a Jinja template")
    text = read_text(path, TokenizerError, _LARGEST_FILE)
    if path.suffix == ".json":
        text = _default_of(read_json_object(path, TokenizerError).get("chat_template"), path)
    _compiled(text)
    return text


def template_by_name(name: str) -> str | None:
    """CoreNet's template if a model's name says Instruct, as Apple's models that were tuned with it have."""
    return OPENELM_TEMPLATE if re.search(r"instruct(?![a-z])", name.lower()) else None


def is_openelm(template: str) -> bool:
    """Whether a template is CoreNet's, in the form that `convert` writes or wrote before it began with BOS."""
    return template.strip() in (OPENELM_TEMPLATE, OPENELM_TEMPLATE.removeprefix("{{ bos_token }}"))


def openelm_segments(messages: Messages, add_generation_prompt: bool) -> list[str]:
    """The conversation's text, split at EOS, in the template of CoreNet's recipe for instruction tuning."""
    segments = [""]
    for message in messages:
        segments[-1] += f"<|{message['role']}|>\n{message['content']}"
        segments.append("\n")
    if add_generation_prompt:
        segments[-1] += "<|assistant|>\n"
    return segments


def check_messages(messages: Messages, roles: Sequence[str] | None) -> None:
    """Check that each message has a role and text.

    Args:
        roles: the roles that the template knows; `None`: the template decides.
    Raises:
        TokenizerError: naming what is wrong.
    """
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str) or (roles is not None and role not in roles):
            raise TokenizerError(f"unknown role {quoted(role)} (choose from {', '.join(roles or CHAT_ROLES)})")
        if not isinstance(message.get("content"), str):
            raise TokenizerError(f"the content of a message must be text (role {role})")


def render_template(
    template: str, messages: Messages, *, add_generation_prompt: bool, tokens: Mapping[str, str]
) -> str:
    """Render a Jinja template as `transformers` does, without running code of the template.

    Args:
        tokens: variables like `bos_token`, with the names of the tokens.
    Raises:
        TokenizerError: if the template is not valid, refuses the messages, or writes too much.
    """
    compiled = _compiled(template)
    values = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
    try:
        return render(compiled, {**values, **tokens, "tools": None, "documents": None})
    except Exception as error:  # whatever the template's expressions raise
        raise TokenizerError(f"the chat template cannot render this conversation: {one_line(error)}") from error


def _default_of(found: Any, path: Path) -> str:
    """The template in a `chat_template` entry: a text, a list of `{name, template}`, or texts by name."""
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = {str(entry.get("name")): entry.get("template") for entry in entries}
    if isinstance(found, dict):
        found = next(iter(found.values())) if len(found) == 1 else found.get("default")
    if not isinstance(found, str):
        raise TokenizerError(f"{path}: chat_template must be text, or a list that has a template named default")
    return found


@lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols

    environment = new_sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(template)
    except (TemplateError, RecursionError, ValueError) as error:
        raise TokenizerError(f"the chat template is not valid: {one_line(error)}") from error


def _generation_tag() -> type:
    """`{% generation %}`, which marks what the assistant writes; here its content is rendered as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012, as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
